"""Runs that are scored on held-out rows of one's own, and by evaluators of one's own."""

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest

from fedproxy.config import load_config
from fedproxy.data.assets import fetch
from fedproxy.errors import ConfigError, DataError
from fedproxy.evaluation.evaluators import Evaluator
from fedproxy.evaluation.results import EvaluationResult
from fedproxy.metric_facts import Metric, declare
from fedproxy.pipeline import asked as asked_module
from fedproxy.pipeline.asked import asked_of
from fedproxy.pipeline.display import Display
from fedproxy.pipeline.evaluation import check_comparable, check_questions
from fedproxy.reporting.pairing import between_runs, evaluations_of, on_sources
from fedproxy.reporting.samples import load_samples
from fedproxy.task_means import mean_scores

SHORT = "evaluation.evaluators.own_data.max_new_tokens=6"


def rows(path, first, last, answer="one"):
    lines = ({"prompt": f"Question: {i}?\nAnswer:", "target": f"{answer} {i}"} for i in range(first, last))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def wards(tmp_path):
    """Two clients with rows of their own, and held-out ones beside them."""
    words = ["data.tasks=[]", "federation.rounds=2", SHORT]
    for name, answer in (("a", "red"), ("b", "green")):
        words.append(f"data.files.{name}={rows(tmp_path / f'{name}.jsonl', 0, 12, answer)}")
        words.append(f"evaluation.files.ward-{name}={rows(tmp_path / f'held_{name}.jsonl', 12, 17, answer)}")
    return words


@pytest.fixture
def tiny_questions():
    fetch("tiny-qa", progress=False)


def test_files_alone_are_tuned_fused_and_scored(run_tiny, wards, monkeypatch, plots):
    read, rows_of = [], asked_module.evaluation_rows
    monkeypatch.setattr(asked_module, "evaluation_rows", lambda config: read.append(config) or rows_of(config))
    report, folder = run_tiny(*wards)
    assert len(read) == 2  # before any work, and for the run
    assert set(report.scores) == {"target", "proxy", "proxy_tuned", "fused"}
    fused, target = report.scores["fused"], report.scores["target"]
    for source in ("ward-a", "ward-b"):
        assert {"answer_nll", "answer_nll_stderr", "perplexity", "exact_match", "f1", "n"} <= fused[source].keys()
        assert fused[source]["answer_nll"] < target[source]["answer_nll"]
        assert fused[source]["n"] == 5
    assert fused["mean"]["answer_nll"] == pytest.approx(sum(fused[w]["answer_nll"] for w in ("ward-a", "ward-b")) / 2)
    page = (folder / "report.md").read_text()
    assert "Mean answer_nll over the tasks, in nats per token, lower is better" in page
    assert "### The fused model on every source of held-out rows" in page
    assert "### Held-out rows by source" in page
    assert "Answer NLL per source" in (folder / "report.html").read_text()
    differences = on_sources(evaluations_of(folder))
    assert [row.name for row in differences] == ["ward-a", "ward-b"]
    assert all(row.difference.high < 0 for row in differences)
    card = (folder / "fused" / "README.md").read_text()
    assert "ward-a" in card
    assert "answer_nll" in card


def test_scores_are_kept_while_rows_and_options_stay(run_tiny, wards, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(Display, "say", lambda self, line: said.append(line))
    few = (*wards, "evaluation.models=[target]", "federation.rounds=1")
    _, folder = run_tiny(*few)
    for words, again in (
        ((), False),
        (("evaluation.evaluators.own_data.max_new_tokens=5",), True),
        (("evaluation.evaluators.own_data.max_new_tokens=5",), False),
    ):
        said.clear()
        run_tiny(*few, *words, "resume=auto", folder=folder)
        assert any(line.startswith("evaluated target") for line in said) is again
    rows(tmp_path / "held_a.jsonl", 30, 34)
    said.clear()
    report, _ = run_tiny(*few, "evaluation.evaluators.own_data.max_new_tokens=5", "resume=auto", folder=folder)
    assert any(line.startswith("evaluated target") for line in said)
    assert report.scores["target"]["ward-a"]["n"] == 4


def test_tasks_and_rows_are_scored_beside_each_other(run_tiny, wards):
    words = [word for word in wards if not word.startswith("data.tasks")]
    report, folder = run_tiny(*words, "data.tasks=[tiny_sums]", "evaluation.models=[target,fused]")
    assert list(report.scores["fused"]) == ["tiny_sums", "ward-a", "ward-b", "mean"]
    assert set(report.scores["fused"]["mean"]) == {"answer_nll", "n"}
    assert {sample["task"] for sample in load_samples(folder, "fused")} == {"tiny_sums", "ward-a", "ward-b"}
    page = (folder / "report.md").read_text()
    assert "then the difference to target in points. Metrics that are no shares are plain numbers." in page


def test_models_of_separate_clients_are_all_asked(run_tiny, wards):
    report, folder = run_tiny(
        *wards,
        "regularizer={name: none}",
        "aggregator={name: none}",
        "federation.rounds=1",
        "evaluation.models=[fused]",
    )
    assert set(report.client_scores) == {"a", "b"}
    own = [report.client_scores[client]["fused"]["ward-a"]["answer_nll"] for client in ("a", "b")]
    assert report.scores["fused"]["ward-a"]["answer_nll"] == pytest.approx(sum(own) / 2)
    assert own[0] < own[1]  # client a has seen such rows, b has not
    assert "### Each client's own model" in (folder / "report.md").read_text()


def test_rounds_can_be_scored_by_an_evaluator(run_tiny, wards):
    words = (
        "federation.validation.every=1",
        "federation.validation.evaluator=own_data",
        "evaluation.models=[proxy_tuned]",
    )
    report, folder = run_tiny(*wards, *words)
    found = [line.validation["ward-a"]["answer_nll"] for line in report.rounds]
    assert found[1] < found[0]
    assert found[1] == pytest.approx(report.scores["proxy_tuned"]["ward-a"]["answer_nll"], rel=1e-5)
    assert "on the 10 questions of the final scores (own_data)" in (folder / "report.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("evaluation.files.x=data_a",),
            "evaluation.files.x is data.files.a or a copy of it, which clients",
        ),
        (("evaluation.files.x=nowhere.jsonl",), "nowhere.jsonl does not exist"),
        (("evaluation.files.mean=data_a",), "evaluation.files must be named otherwise"),
        (("evaluation.evaluators.own_dat={}",), "unknown evaluator.*own_data"),
        (("evaluation.evaluators.own_data.stop=['']",), "evaluators.own_data.stop must be a list of texts, none"),
        (("evaluation.fewshot_as_multiturn=true",), "fewshot_as_multiturn must be false unless evaluation.apply_chat"),
        (("federation.validation.evaluator=own",), "federation.validation.evaluator: unknown evaluator 'own'"),
        (
            ("federation.validation={every: 1, select: best, evaluator: own_data}",),
            "federation.validation.select must be last where an evaluator scores rounds",
        ),
        (("evaluation.tasks=[ward-a]",), "'ward-a' is the name of a source of lm_eval and of own_data; rename one"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_any_work(wards, tmp_path, words, message):
    words = [word.replace("data_a", str(tmp_path / "a.jsonl")) for word in words]
    with pytest.raises((ConfigError, DataError), match=message):
        check_questions(load_config(["recipe=fedproxy_tiny", *wards, *words]), Display())


def test_a_broken_row_names_file_and_line(wards, tmp_path):
    (tmp_path / "held_a.jsonl").write_text('{"prompt": "a", "target": "b"}\n{"prompt": "a"}\n')
    with pytest.raises(DataError, match=r"held_a.jsonl line 2 has no column 'target'"):
        asked_of(load_config(["recipe=fedproxy_tiny", *wards]))


@pytest.mark.usefixtures("tiny_questions")
def test_methods_are_compared_by_what_all_sources_have(wards):
    check_comparable(load_config(["recipe=fedproxy_tiny", *wards]))
    check_comparable(load_config(["recipe=fedproxy_tiny", *wards, "evaluation.tasks=[tiny_sums]"]))


@pytest.mark.real_model
def test_sources_without_a_common_metric_are_refused_before_the_first_run(wards):
    fetch("open-qa", progress=False)
    tiny = ["recipe=fedproxy_tiny", *(word for word in wards if not word.startswith("evaluation.files"))]
    said = r"evaluation: 'squad' has no metric by which methods could be compared, as sources before it do \(answer_nll"
    with pytest.raises(ConfigError, match=said):
        check_comparable(load_config([*tiny, "data.holdout=2", "evaluation.tasks=[squad]"]))
    check_comparable(load_config([*tiny, "evaluation.tasks=[squad]"]))


def test_an_evaluator_without_a_headline_that_reports_know_is_not_compared():
    @dataclass(frozen=True)
    class Shades(Evaluator, name="shades"):
        headline: ClassVar[str] = "shade"

        def sources(self, asked):
            return ["rose"]

        def score(self, model, tokenizer, asked, *, progress=None):
            raise AssertionError

    words = ["recipe=fedproxy_tiny", "evaluation.tasks=[]", "evaluation.evaluators.shades={}"]
    with pytest.raises(ConfigError, match=r"evaluation: 'rose' has no metric by which methods could be compared"):
        check_comparable(load_config(words))


def test_an_evaluator_of_ones_own_takes_part(run_tiny, wards):
    declare(Metric("length", higher_is_better=False, share=False))

    @dataclass(frozen=True)
    class Lengths(Evaluator, name="lengths"):
        """Scores how many parameters a model has, for every letter."""

        letters: str = "xy"
        headline: ClassVar[str] = "length"

        def sources(self, asked):
            return list(self.letters)

        def fingerprint(self, asked):
            return self.letters

        def score(self, model, tokenizer, asked, *, progress=None):
            scores = {letter: {"length": float(model.num_parameters()), "n": 1} for letter in self.letters}
            samples = [{"task": letter, "doc_id": 0, "doc_hash": letter, "length": 1.0} for letter in self.letters]
            return EvaluationResult(scores, mean_scores(scores), samples, {"configs": {}}, 0.0, ["counted"])

    words = [word for word in wards if not word.startswith(("evaluation.", SHORT))]
    report, folder = run_tiny(*words, "evaluation.tasks=[]", "evaluation.evaluators.lengths.letters=pq")
    assert report.scores["fused"]["p"]["length"] == report.cost.target_parameters
    assert report.scores["proxy"]["mean"]["length"] == report.cost.proxy_parameters
    assert any("fused: counted" in note for note in report.notes)
    assert "length" in (folder / "report.md").read_text()


def chats(path, count, answer):
    lines = (
        {
            "messages": [
                {"role": "user", "content": f"{answer[0]} {i}?"},
                {"role": "assistant", "content": f"{answer} {i}"},
            ]
        }
        for i in range(count)
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def held(tmp_path):
    """Two clients that hold out some of their own conversations."""
    files = {name: chats(tmp_path / f"{name}.jsonl", 16, answer) for name, answer in (("a", "red"), ("b", "green"))}
    words = [f"data.files.{name}={path}" for name, path in files.items()]
    return [*words, "data.tasks=[]", "data.format.name=chat", "data.holdout=5", "federation.rounds=2", SHORT]


def test_every_clients_held_out_rows_are_scored(run_tiny, held):
    report, folder = run_tiny(*held)
    fused, target = report.scores["fused"], report.scores["target"]
    assert set(fused) == {"held_out/a", "held_out/b", "mean"}
    for source in ("held_out/a", "held_out/b"):
        assert fused[source]["n"] == 5
        assert fused[source]["answer_nll"] < target[source]["answer_nll"]
        assert "f1" in fused[source]
    assert "held_out/a" in (folder / "report.md").read_text()
    assert len(on_sources(evaluations_of(folder))) == 2


def test_a_client_alone_is_asked_its_own_rows_and_pooled_rows_are_the_same(run_tiny, held):
    few = (*held, "federation.rounds=1", "evaluation.models=[fused]")
    alone, folder = run_tiny(*few, "regularizer={name: none}", "aggregator={name: none}")
    assert set(alone.client_scores["a"]["fused"]) == {"held_out/a"}
    assert alone.scores["fused"]["held_out/a"] == alone.client_scores["a"]["fused"]["held_out/a"]
    assert set(alone.scores["fused"]) == {"held_out/a", "held_out/b", "mean"}
    pooled, other = run_tiny(
        *few, "regularizer={name: none}", "data.partition={name: pooled}", "aggregator={name: fedavg}"
    )
    assert set(pooled.scores["fused"]) == {"held_out/a", "held_out/b", "mean"}
    asked = [
        sorted((sample["task"], sample["doc_hash"], sample["prompt_hash"]) for sample in load_samples(one, "fused"))
        for one in (folder, other)
    ]
    assert asked[0] == asked[1]
    between_runs(folder, other)  # they pair up
