"""The family of evaluators: its members, results of several as one, and the example of the documentation."""

from pathlib import Path

import pytest

from fedproxy.errors import ConfigError
from fedproxy.evaluation.evaluators import Evaluator
from fedproxy.evaluation.evaluators.base import Asked
from fedproxy.evaluation.evaluators.own_data import OwnData
from fedproxy.evaluation.own_data import score_rows
from fedproxy.evaluation.results import EvaluationResult, merged
from fedproxy.metric_facts import HEADLINES, Metric, facts, headline_of

from .test_own_data import ROWS

PAGE = Path(__file__).parents[2] / "docs" / "evaluation.md"


def test_lm_eval_and_own_rows_are_always_there():
    assert {name for name in Evaluator.names() if Evaluator.by_name(name).always} == {"lm_eval", "own_data"}
    with pytest.raises(ConfigError, match="unknown evaluator 'own'"):
        Evaluator.by_name("own")


def test_results_of_several_evaluators_are_one(model, tokenizer):
    own = score_rows(model, tokenizer, {"ward": ROWS}, OwnData(max_new_tokens=0))
    assert merged([own]) is own
    other = EvaluationResult(
        {"arc": {"acc": 0.5, "answer_nll": 2.0, "n": 4}}, {}, [{"task": "arc"}],
        {"configs": {"arc": {"a": 1}}, "versions": {"arc": 1}, "date": 3}, 2.0, ["a note"],
    )  # fmt: skip
    both = merged([other, own])
    assert list(both.scores) == ["arc", "ward"]
    assert both.mean == {"answer_nll": pytest.approx((2.0 + own.scores["ward"]["answer_nll"]) / 2), "n": 7}
    assert set(both.lm_eval["configs"]) == set(both.lm_eval["versions"]) == {"arc", "ward"}
    assert both.lm_eval["date"] == 3
    assert [sample["task"] for sample in both.samples] == ["arc", "ward", "ward", "ward"]
    assert both.seconds == 2.0 + own.seconds
    assert both.notes == ["a note"]


def test_what_is_known_of_metrics():
    assert headline_of(["f1", "answer_nll", "acc"]) == "acc"
    assert headline_of(["perplexity"]) is None
    assert facts("answer_nll") == Metric("answer_nll", higher_is_better=False, share=False)
    assert facts("exact_match:strict-match").share
    assert not facts("something_else").share  # an unknown one is a plain number
    assert all(facts(name).name == name for name in HEADLINES)


def test_the_documentations_evaluator_scores_a_model(model, tokenizer):
    code = PAGE.read_text().partition("## An evaluator of your own")[2].split("```python\n")[1].split("```")[0]
    exec(compile(code, str(PAGE), "exec"), {"__name__": "documentation"})
    evaluator = Evaluator.by_name("answer_length")(longest=5)
    result = evaluator.score(model, tokenizer, Asked())
    assert 0 <= result.scores["length"]["length"] <= 5
    assert len(result.samples) == 2
    assert evaluator.fingerprint(Asked()) == 5
