"""Pages of runs and comparisons that are scored by the likelihood of answers alone."""

import json
from dataclasses import replace

import pytest

from fedproxy.reporting import formatting as show
from fedproxy.reporting.comparison.analysis import analyse
from fedproxy.reporting.comparison.tables import gain_table, score_table
from fedproxy.reporting.formatting import MINUS
from fedproxy.reporting.markdown import to_markdown
from fedproxy.reporting.pairing import against_target, evaluations_of, on_sources, paired_hint, paired_table
from fedproxy.reporting.samples import save_evaluation
from fedproxy.reporting.scores import Value, with_means
from fedproxy.reporting.summary import summary
from fedproxy.reporting.view import build_view

from .comparison.comparison_samples import make_record
from .report_samples import full_report

TARGET = {"ward": {"answer_nll": 3.0, "answer_nll_stderr": 0.2, "perplexity": 20.1, "f1": 0.25, "n": 4}}
FUSED = {"ward": {"answer_nll": 2.25, "answer_nll_stderr": 0.1, "perplexity": 9.5, "f1": 0.5, "n": 4}}


@pytest.fixture
def report():
    return replace(full_report(), scores=with_means({"target": TARGET, "fused": FUSED}), notes=())


@pytest.fixture
def run(tmp_path):
    """Samples of two models: every answer is likelier after tuning, by 0.5 to 1 nats."""
    for model, shift in (("target", 0.0), ("fused", -0.5)):
        samples = [
            {"task": "ward", "doc_hash": str(i), "answer_nll": 3 + i / 10 + shift * (1 + i / 9), "answer_tokens": 2}
            for i in range(10)
        ]
        save_evaluation(tmp_path, model, samples, {"configs": {"ward": {"evaluator": "own_data"}}})
    return tmp_path


def test_numbers_have_the_metrics_own_form():
    assert show.measured("answer_nll", Value(2.25, 0.1)) == "2.250 ± 0.100"
    assert show.measured("acc", Value(0.25, 0.1)) == "25.0 ± 10.0"
    assert show.measured_change("answer_nll", Value(-0.75, 0.1), with_stderr=True) == f"{MINUS}0.750 ± 0.100"
    assert show.measured_interval("answer_nll", -1, 0.5) == f"{MINUS}1.000 to +0.500"
    assert show.unit("answer_nll") == "in nats per token, lower is better"
    assert show.unit("acc") == "in per cent"
    assert show.unit("perplexity") == "lower is better"
    assert show.unit("margin") == ""


def test_the_headline_counts_a_lower_likelihood_loss_as_a_gain(report):
    view = build_view(report, "run")
    assert view.headline.metric == "answer_nll"
    assert (view.headline.before, view.headline.after) == ("3.000 ± 0.200", "2.250 ± 0.100")
    assert view.headline.difference.startswith(f"{MINUS}0.750")
    assert view.headline.gain == 0.75
    assert view.scores.rows[0][1:3] == ["3.000 ± 0.200", f"2.250 ± 0.100 ({MINUS}0.750, better)"]
    assert view.held_out.head == ["source", "model", "answer_nll", "perplexity", "f1 %"]
    assert view.held_out.rows[1] == ["ward", "fused", "2.250 ± 0.100", "9.500", "50.0"]
    assert "mean answer_nll over 1 tasks, nats per token, lower is better" in summary(report)


def test_differences_have_signs_intervals_and_a_test_that_fits(run, report):
    (row,) = against_target(evaluations_of(run))
    # mean over i of -0.5 * (1 + i / 9) is -0.75; all ten answers are better
    assert row.difference.estimate == pytest.approx(-0.75)
    assert row.difference.low < -0.75 < row.difference.high < 0
    assert (row.only_first, row.only_second) == (0, 10)
    assert row.p_value == pytest.approx(2 / 1024, abs=0.002)  # all ten signs alike
    assert row.answer_nll is None
    table = paired_table([row])
    assert "sign-flip p" in table.head
    assert table.rows[0][2] == f"{MINUS}0.750"
    assert "below 0 is better" in paired_hint([row])
    sources = on_sources(evaluations_of(run))
    assert [one.name for one in sources] == ["ward"]
    page = to_markdown(report, run, [row], sources)
    assert f"| ward   |        10 |                {MINUS}0.750 |" in page


def test_methods_are_compared_by_likelihood_with_gains_above_zero(tmp_path):
    runs = {}
    for label, likely in (("a", 1.0), ("b", 2.0)):
        record = make_record(tmp_path / label, label, 1, 0.6)
        answers = {
            model: {
                task: replace(own, values={"answer_nll": [3.0 if model == "target" else likely] * 10})
                for task, own in tasks.items()
            }
            for model, tasks in record.answers.items()
        }
        runs[label] = [replace(record, answers=answers)]
    found = analyse(runs, ceiling="a", reference="a")
    assert found.metric == "answer_nll"
    rows = {row.label: row for row in found.methods}
    assert rows["a"].against_zero_shot.interval.estimate == 2.0  # 3 to 1 nats
    assert rows["b"].recovered.estimate == 0.5
    assert rows["b"].reference_minus.interval.estimate == 1.0  # the reference is better
    assert rows["a"].scores["mean"].value == 1.0
    assert score_table(found).rows[1][1] == "1.000 ± 0.000"
    assert gain_table(found).rows[0][1] == "+2.000"
    assert json.dumps([row.label for row in found.methods])
