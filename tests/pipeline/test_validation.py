"""Validation inside a whole run: it scores what it says, touches nothing, and the best round's state is fused."""

import json

import pytest
import torch
from safetensors.torch import load_file

from fedproxy.config import load_config
from fedproxy.errors import ConfigError, DataError
from fedproxy.evaluation.task_rows import render_rows
from fedproxy.evaluation.validation import score_questions
from fedproxy.models import load_model, load_tokenizer, state_sha256
from fedproxy.pipeline import validation
from fedproxy.pipeline.data import client_rows
from fedproxy.pipeline.validation import held_out

EVERY = ("federation.validation.every=1", "federation.validation.rows=8")
BEST = (*EVERY, "federation.validation.select=best")
QUICK = ("evaluation.models=[]",)


def lines(folder):
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def settings(*overrides):
    return load_config(["recipe=fedproxy_tiny", "data.rows_per_task=32", *EVERY, *overrides])


def test_held_out_rows_are_training_rows_of_no_client():
    config = settings()
    clients = client_rows(config.data, seed=config.seed)
    owned = {row.key for own in clients.values() for row in own}
    questions = held_out(config, clients)
    assert {question.source for question in questions} == set(config.data.tasks)
    assert len({question.key for question in questions}) == 4 * 8
    train = {row.key for task in config.data.tasks for row in render_rows(task, "train")}
    assert {question.key for question in questions} <= train - owned
    tested = {row.prompt for task in config.data.tasks for row in render_rows(task, "test")}
    assert not tested & {context for question in questions for context, _ in question.requests}
    assert held_out(load_config(["recipe=fedproxy_tiny"]), clients) == []


def test_validation_changes_nothing_of_the_tuning(tiny_run, run_tiny, plots):
    _, plain = tiny_run
    report, folder = run_tiny(*EVERY, *QUICK)
    for group in ("state", "conflict"):
        left, right = (load_file(run / f"checkpoints/round_0002/{group}.safetensors") for run in (plain, folder))
        assert all(torch.equal(left[name], right[name]) for name in left)
    found = report.rounds[0].validation
    assert set(found) == {"tiny_colors", "tiny_sums", "tiny_opposites", "tiny_places", "mean"}
    assert found["tiny_sums"]["n"] == 8
    assert "validation" not in lines(plain)[0]
    page = (folder / "report.html").read_text()
    assert "Validation loss per round" in page
    assert "Validation accuracy per round" in page
    assert "The state after round 2 was fused, the last." in (folder / "report.md").read_text()
    assert report.cost.evaluation_seconds >= sum(line["validation_seconds"] for line in lines(folder)) > 0


@pytest.mark.parametrize("model", ["proxy", "fused"])
def test_the_model_that_is_scored_is_the_one_that_a_run_ends_with(run_tiny, model):
    config = settings()
    report, folder = run_tiny(*EVERY, *QUICK, "federation.rounds=1", f"federation.validation.model={model}")
    questions = held_out(config, client_rows(config.data, seed=config.seed))
    if model == "fused":
        tuned = load_model(folder / "fused")
    else:
        from peft import PeftModel

        tuned = PeftModel.from_pretrained(load_model(folder / "proxy"), folder / "adapter").merge_and_unload()
    expected = score_questions(tuned, load_tokenizer(folder / "proxy"), questions)
    for source, scores in report.rounds[0].validation.items():
        assert scores == pytest.approx(expected[source], abs=1e-5), source


def test_the_best_rounds_state_is_fused_also_after_an_interrupt(run_tiny, monkeypatch):
    losses = iter([3.0, 1.0, 2.0, 2.5])
    monkeypatch.setattr(
        validation, "score_questions", lambda *_: {"mean": {"answer_nll": next(losses), "n": 32.0, "acc": 0.5}}
    )
    _, second = run_tiny("federation.rounds=2", *QUICK)
    from fedproxy.federation.client.site import Site

    train = Site.train

    def interrupted(self, broadcast, client_id):
        if broadcast.round == 4:
            raise KeyboardInterrupt
        return train(self, broadcast, client_id)

    with monkeypatch.context() as patch:
        patch.setattr(Site, "train", interrupted)
        folder = second.parent / "best"
        with pytest.raises(KeyboardInterrupt, match="resume=auto"):
            run_tiny("federation.rounds=4", *BEST, *QUICK, folder=folder)
    assert (folder / "checkpoints/round_0002").is_dir()
    report, _ = run_tiny("federation.rounds=4", *BEST, *QUICK, "resume=auto", folder=folder)
    assert [line["validation"]["mean"]["answer_nll"] for line in lines(folder)] == [3.0, 1.0, 2.0, 2.5]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "round_0002",
        "round_0003",
        "round_0004",
    ]
    assert state_sha256(load_model(folder / "fused")) == state_sha256(load_model(second / "fused"))
    adapters = [load_file(run / "adapter/adapter_model.safetensors") for run in (second, folder)]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
    assert report.validation.fused_after_round == 2
    text = "The state after round 2 was fused, the best by mean answer_nll."
    assert text in (folder / "report.md").read_text()
    assert json.loads((folder / "report.json").read_text())["validation"] == {
        "model": "proxy", "metric": "answer_nll", "select": "best", "questions": 32, "fused_after_round": 2,
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"resume=auto: federation.validation.select is 'last', but the run in"):
        run_tiny("federation.rounds=4", *EVERY, *QUICK, "resume=auto", folder=folder)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["every=-1"], r"^federation.validation.every must be at least 0, got -1$"),
        (["rows=0"], r"^federation.validation.rows must be at least 1, got 0$"),
        (["every=0", "select=best"], r"^federation.validation.every must be at least 1 with select=best, got 0$"),
        (["every=9", "select=best"], r"^federation.validation.every must be at most the 6 rounds with select=best"),
        (["metric=accuracy"], r"^federation.validation.metric must be one of .*, got 'accuracy'"),
    ],
)
def test_settings_that_cannot_be_are_told_in_one_line(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(["recipe=fedproxy_tiny", *(f"federation.validation.{override}" for override in overrides)])


def test_clients_that_own_everything_leave_nothing_to_validate_on(run_tiny):
    with pytest.raises(DataError, match=r"clients leave 0 training rows of 'tiny_colors' without an owner; lower it"):
        run_tiny(*EVERY, "data.rows_per_task=null", "federation.rounds=1")


@pytest.mark.parametrize(
    ("words", "lacking"),
    [
        (["evaluation.models=[]"], "models in evaluation.models"),
        (["evaluation.tasks=[]"], "tasks or files in evaluation"),
    ],
)
def test_an_evaluator_without_questions_says_what_to_name(words, lacking):
    config = settings("federation.validation.evaluator=own_data", *words)
    with pytest.raises(ConfigError, match=f"own_data has nothing to ask; name {lacking}, or leave the key null$"):
        held_out(config, {})


def test_a_metric_that_a_source_lacks(tmp_path):
    rows = [{"prompt": f"Question: {i}?\nAnswer:", "target": " one"} for i in range(20)]
    (tmp_path / "ward.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = ("data.tasks=[]", "evaluation.tasks=[tiny_sums]", f"data.files.ward={tmp_path / 'ward.jsonl'}")
    config = settings(*own, "data.rows_per_task=12", "federation.validation.metric=acc")
    clients = client_rows(config.data, seed=config.seed)
    with pytest.raises(ConfigError, match=r"^federation.validation.metric: 'ward' has no acc; choose answer_nll$"):
        held_out(config, clients)
    config = settings(*own, "data.rows_per_task=12")
    owned = {row.key for row in clients["ward"]}
    assert len({question.key for question in held_out(config, clients)} - owned) == 8
