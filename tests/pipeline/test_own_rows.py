"""Runs on files of one's own: without a task to score, with rows that end, and with rows that are too long."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fedproxy.config import load_config
from fedproxy.data.assets import resolve
from fedproxy.data.partition.rows import read_client_rows
from fedproxy.data.tokenisation import tokenise
from fedproxy.errors import ConfigError, DataError
from fedproxy.federation.client.site import Site
from fedproxy.models import load_model, load_tokenizer
from fedproxy.pipeline.data import client_rows
from fedproxy.pipeline.evaluation import check_comparable


@pytest.fixture
def ward(tmp_path):
    rows = [{"prompt": f"Question: {i}?\nAnswer:", "target": f"one {i}"} for i in range(6)]
    (tmp_path / "ward.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ("data.tasks=[]", f"data.files.ward={tmp_path / 'ward.jsonl'}")


@pytest.mark.parametrize("words", [(), ("evaluation.tasks=[]",), ("evaluation.models=[]",)])
def test_files_alone_are_trained_on_and_fused_and_nothing_is_scored(run_tiny, ward, words):
    report, folder = run_tiny(*ward, "federation.rounds=1", *words)
    assert report.run.status == "completed"
    assert report.scores == {}
    key = "evaluation.models" if "evaluation.models=[]" in words else "evaluation.tasks"
    assert f"Nothing was scored: {key} names none." in report.notes
    assert f"Nothing was scored: {key} names none." in (folder / "report.md").read_text()
    assert load_model(folder / "fused").num_parameters() == report.cost.target_parameters
    assert not (folder / "evaluation").exists()


def test_scores_of_an_earlier_session_stay_where_nothing_is_scored(run_tiny):
    few = ("federation.rounds=1", "data.tasks=[tiny_sums]")
    report, folder = run_tiny(*few, "evaluation.models=[target]")
    run_tiny(*few, "evaluation.models=[]", "resume=auto", folder=folder)
    assert (folder / "evaluation/target.scores.json").is_file()
    assert report.scores


def test_a_comparison_needs_scores(ward):
    with pytest.raises(
        ConfigError,
        match=r"evaluation.tasks and evaluation.files name nothing, and methods are",
    ):
        check_comparable(load_config(["recipe=fedproxy_tiny", *ward]))


def test_targets_of_files_end_and_those_of_tasks_do_not(ward):
    tasks = ("data.tasks=[tiny_sums]", "data.rows_per_task=4")
    for words, expected in (
        ((), {"tiny_sums": False, "ward": True}),
        (("data.end_token=always",), {"tiny_sums": True, "ward": True}),
        (("data.end_token=never",), {"tiny_sums": False, "ward": False}),
    ):
        clients = client_rows(load_config(["recipe=fedproxy_tiny", *ward, *tasks, *words]).data, seed=1)
        assert {name: {row.ends for row in rows} for name, rows in clients.items()} == {
            name: {ends} for name, ends in expected.items()
        }


def test_a_client_trains_on_the_end_token(run_tiny, ward):
    _, folder = run_tiny(*ward, "federation.rounds=1")
    tokenizer = load_tokenizer(folder / "proxy")
    examples = tokenise(read_client_rows(folder / "rows", "ward"), tokenizer, max_input_tokens=96, max_target_tokens=16)
    assert {example.input_ids[-1] for example in examples} == {tokenizer.eos_token_id}


@pytest.fixture
def short_target(tmp_path):
    """A model of 24 positions with the tiny asset's tokenizer."""
    tokenizer = load_tokenizer(resolve("asset:tiny-llama"))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", vocab_size=len(tokenizer), max_position_embeddings=24, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    return (f"target.path={tmp_path / 'target'}", "federation.rounds=1", "compression.calibration.max_tokens=16")


def test_rows_that_are_cut_are_counted_on_the_console_and_in_the_report(
    run_tiny, tmp_path, short_target, monkeypatch, capsys
):
    rows = [("a b", "c"), ("word " * 60, "yes"), ("a b", "word " * 60)]
    text = "".join(json.dumps({"prompt": prompt, "target": target}) + "\n" for prompt, target in rows)
    (tmp_path / "ward.jsonl").write_text(text)
    trained = []
    train = Site.train

    def watch(self, broadcast, client_id, **limits):
        trained.extend(self.examples[client_id])
        return train(self, broadcast, client_id, **limits)

    monkeypatch.setattr(Site, "train", watch)
    report, folder = run_tiny("data.tasks=[]", f"data.files.ward={tmp_path / 'ward.jsonl'}", *short_target,
                              "data.max_input_tokens=256")  # fmt: skip
    note = (
        "2 of 3 rows are cut to fit: prompts of 1, targets of 1 (data.max_input_tokens=256, "
        "data.max_target_tokens=16, 24 positions of the model)."
    )
    assert note in report.notes
    assert note in " ".join(capsys.readouterr().err.split())
    assert max(len(example.input_ids) for example in trained) == 24
    assert [example.input_ids[-1] == load_tokenizer(folder / "proxy").eos_token_id for example in trained] == [
        True,
        True,
        False,  # its target was cut
    ]


@pytest.mark.parametrize("end_token", ["auto", "always"])
def test_a_tokenizer_without_an_end_token_is_said_or_refused(run_tiny, ward, tmp_path, end_token):
    target = tmp_path / "target"
    load_model(resolve("asset:tiny-llama")).save_pretrained(target)
    tokenizer = load_tokenizer(resolve("asset:tiny-llama"))
    tokenizer.eos_token = None
    tokenizer.save_pretrained(target)
    words = (*ward, f"target.path={target}", "federation.rounds=1", f"data.end_token={end_token}")
    if end_token == "auto":
        note = "The tokenizer has no end-of-sequence token: targets of data.files are trained without an end."
        assert note in run_tiny(*words)[0].notes
        return
    with pytest.raises(
        DataError, match=r"data.end_token=always: the tokenizer of .* has no end-of-sequence token; use"
    ):
        run_tiny(*words, folder=tmp_path / "out")
    assert not (tmp_path / "out/proxy").exists()  # before any work


def test_an_end_token_at_which_the_model_does_not_stop_is_said(run_tiny, ward, tmp_path):
    model = load_model(resolve("asset:tiny-llama"))
    model.config.eos_token_id = model.generation_config.eos_token_id = [1, 3]
    model.save_pretrained(tmp_path / "target")
    load_tokenizer(resolve("asset:tiny-llama")).save_pretrained(tmp_path / "target")
    words = (*ward, f"target.path={tmp_path / 'target'}", "federation.rounds=0")
    said = [note for note in run_tiny(*words)[0].notes if "generation does not stop there by itself" in note]
    assert len(said) == 1
    assert not [note for note in run_tiny(*ward, "federation.rounds=0")[0].notes if "does not stop" in note]


def test_a_weight_that_leaves_a_client_no_row_is_refused(ward, tmp_path):
    (tmp_path / "clinic.jsonl").write_text('{"prompt": "Q", "target": "A"}\n')
    words = ["recipe=fedproxy_tiny", *ward, f"data.files.clinic={tmp_path / 'clinic.jsonl'}"]
    clients = client_rows(load_config([*words, "data.weights.ward=0.1"]).data, seed=1)
    assert {name: len(rows) for name, rows in clients.items()} == {"clinic": 1, "ward": 1}  # 0.6 of a row is one
    for weight in ("0.08", "0.01"):
        config = load_config([*words, f"data.weights.ward={weight}"])
        with pytest.raises(DataError, match=rf"^data.weights.ward={weight}: that share of its 6 rows is less than"):
            client_rows(config.data, seed=1)
