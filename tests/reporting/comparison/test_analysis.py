"""Every figure against one worked out beside it from the answers themselves."""

import math
from dataclasses import replace

import numpy as np
import pytest

from fedproxy.errors import EvaluationError
from fedproxy.reporting.comparison.analysis import analyse
from fedproxy.reporting.statistics import holm

from .comparison_samples import make_record, make_runs


def column(record, model, task):
    return np.array(record.answers[model][task].values["acc_norm"])


@pytest.fixture
def runs(tmp_path):
    return make_runs(tmp_path)


@pytest.fixture
def rows(runs):
    return {row.label: row for row in analyse(runs, ceiling="central", reference="fedproxy").methods}


def test_scores_are_means_over_seeds_with_both_standard_errors(runs, rows):
    row, records = rows["fedproxy"], runs["fedproxy"]
    by_question = {task: np.mean([column(r, "fused", task) for r in records], axis=0) for task in ("easy", "hard")}
    errors = []
    for task, values in by_question.items():
        assert row.scores[task].value == pytest.approx(values.mean())
        errors.append(values.std(ddof=1) / math.sqrt(40))
        assert row.scores[task].stderr_questions == pytest.approx(errors[-1])
    means = [np.mean([column(record, "fused", task).mean() for task in by_question]) for record in records]
    assert row.scores["mean"].value == pytest.approx(np.mean(means))
    assert row.scores["mean"].stderr_questions == pytest.approx(math.hypot(*errors) / 2)
    assert row.scores["mean"].stderr_seeds == pytest.approx(abs(means[0] - means[1]) / 2)  # sd / sqrt 2 of two values
    assert list(row.scores["mean"].by_seed.values()) == pytest.approx(means)


def test_one_seed_has_no_spread_over_seeds(tmp_path):
    found = analyse(make_runs(tmp_path, seeds=(1,)))
    assert found.methods[0].scores["mean"].stderr_seeds is None
    assert (found.ceiling, found.reference) == (None, None)
    assert found.methods[0].recovered is None


def test_differences_are_means_over_tasks_of_answers_averaged_over_seeds(runs, rows):
    def mean(label, model="fused"):
        return np.mean([column(record, model, task).mean() for record in runs[label] for task in ("easy", "hard")])

    gain = rows["fedproxy"].against_zero_shot
    assert gain.interval.estimate == pytest.approx(mean("fedproxy") - mean("fedproxy", "target"))
    assert gain.interval.low < gain.interval.estimate < gain.interval.high
    assert rows["fedproxy"].against_ceiling.interval.estimate == pytest.approx(mean("fedproxy") - mean("central"))
    assert rows["fed<avg>"].reference_minus.interval.estimate == pytest.approx(mean("fedproxy") - mean("fed<avg>"))
    assert rows["fedproxy"].reference_minus is None
    assert rows["central"].against_ceiling is None
    base = mean("central", "target")
    share = (mean("fedproxy") - base) / (mean("central") - base)
    assert rows["fedproxy"].recovered.estimate == pytest.approx(share)
    assert rows["central"].recovered.estimate == pytest.approx(1)


def test_answer_nll_is_the_reports_own_averaged_over_seeds(runs):
    found = analyse(runs)
    assert found.zero_shot_nll == 7.5
    assert {row.label: row.answer_nll for row in found.methods} == dict.fromkeys(runs, 4.75)  # seeds 1 and 2: 4.5 and 5
    lacking = runs["fedproxy"][1].report.scores["fused"]["mean"].pop("answer_nll")
    assert lacking == 5.0
    assert analyse(runs).methods[2].answer_nll is None  # a mean over one of two seeds would be another number


def test_the_reference_is_paired_by_answer_nll_too(runs):
    def nlls(label):
        return np.mean([[record.answers["fused"][task].values["answer_nll"] for task in ("easy", "hard")]
                        for record in runs[label]], axis=0)  # fmt: skip

    for record in runs["central"]:  # some answers become less likely, others more
        for own in record.answers["fused"].values():
            own.values["answer_nll"] = [value + math.sin(i) for i, value in enumerate(own.values["answer_nll"])]
    rows = {row.label: row for row in analyse(runs, reference="fedproxy").methods}
    found, differences = rows["central"].reference_minus_nll, nlls("fedproxy") - nlls("central")
    assert found.estimate == pytest.approx(differences.mean())
    # 1.96 standard errors of the paired differences, which are far less than those of either method's own values.
    error = math.hypot(*(task.std(ddof=1) / math.sqrt(len(task)) for task in differences)) / 2
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.1)
    assert rows["fedproxy"].reference_minus_nll is None


def test_without_every_questions_answer_nll_there_is_no_paired_one(runs):
    del runs["central"][0].answers["fused"]["easy"].values["answer_nll"]
    rows = {row.label: row for row in analyse(runs, reference="fedproxy").methods}
    assert rows["central"].reference_minus_nll is None
    assert rows["fed<avg>"].reference_minus_nll is not None
    assert rows["central"].reference_minus is not None


def test_p_values_are_corrected_over_the_methods_of_a_column(rows):
    plain = {label: row.against_zero_shot.p_value for label, row in rows.items()}
    assert {label: row.against_zero_shot.holm_p_value for label, row in rows.items()} == holm(plain)
    against = {label: row.reference_minus for label, row in rows.items() if row.reference_minus}
    assert set(against) == {"central", "fed<avg>"}
    assert max(d.holm_p_value for d in against.values()) <= 2 * max(d.p_value for d in against.values())


def test_the_same_answers_twice_are_no_difference(tmp_path):
    runs = make_runs(tmp_path, rates={"zero_shot": 0.40, "fedproxy": 0.55}, seeds=(1,))
    rows = {row.label: row for row in analyse(runs).methods}
    assert rows["zero_shot"].against_zero_shot is None  # right at the same questions as the target
    assert rows["fedproxy"].against_zero_shot.holm_p_value == rows["fedproxy"].against_zero_shot.p_value  # alone


def test_a_method_that_lacks_a_seed_is_paired_over_the_seeds_it_has(runs):
    only = {**runs, "fed<avg>": runs["fed<avg>"][1:]}
    rows = {row.label: row for row in analyse(only, ceiling="central").methods}
    assert rows["fed<avg>"].against_ceiling.seeds == [2]
    ceiling = np.mean([column(runs["central"][1], "fused", task).mean() for task in ("easy", "hard")])
    own = rows["fed<avg>"].scores["mean"].value
    assert rows["fed<avg>"].against_ceiling.interval.estimate == pytest.approx(own - ceiling)


def test_another_model_can_stand_for_a_method(tmp_path):
    records = [make_record(tmp_path / "r", "no_plug_in", 1, 0.6, proxy_tuned=0.45)]
    fused = analyse({"a": records}).methods[0]
    tuned = analyse({"a": records}, scored={"a": "proxy_tuned"}).methods[0]
    assert (fused.scored, tuned.scored) == ("fused", "proxy_tuned")
    assert tuned.scores["mean"].value < fused.scores["mean"].value
    with pytest.raises(EvaluationError, match=r"a, seed 1, scored no proxy; add it to evaluation.models"):
        analyse({"a": records}, scored={"a": "proxy"})


def test_a_target_that_nobody_scored_is_one_line(runs):
    blind = {
        label: [replace(record, answers={"fused": record.answers["fused"]}) for record in own]
        for label, own in runs.items()
    }
    with pytest.raises(EvaluationError, match=r"no run scored the target; add it to evaluation.models of one recipe"):
        analyse(blind)


def test_answers_without_accuracy_cannot_be_compared(tmp_path):
    record = make_record(tmp_path / "r", "a", 1, 0.6)
    easy = record.answers["fused"]["easy"]
    record = replace(record, answers={"fused": {"easy": replace(easy, values={"bleu": [1.0]})}})
    with pytest.raises(EvaluationError, match="in common, by which methods could be compared"):
        analyse({"a": [record]})


def test_cost_and_exposure_are_means_over_seeds(runs, rows):
    cost = rows["fedproxy"].cost
    assert cost["upload_bytes"] == runs["fedproxy"][0].report.cost.upload_bytes
    assert (cost["examples"], cost["client_seconds"]) == (640, 50.0)
    shown = rows["fedproxy"].exposure
    assert shown["disclosed_parameter_share"] == 0.6
    assert shown["proxy_tuned"] == pytest.approx(runs["fedproxy"][0].report.scores["proxy_tuned"]["mean"]["acc_norm"])
