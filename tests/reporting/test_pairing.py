import json
from itertools import product

import pytest

from fedproxy.errors import EvaluationError
from fedproxy.reporting.pairing import against_target, between_runs, evaluations_of, paired_table
from fedproxy.reporting.run_comparison import comparison_page
from fedproxy.reporting.samples import (
    load_evaluation,
    load_samples,
    require_comparable,
    save_evaluation,
    task_settings,
)
from fedproxy.reporting.statistics import holm, mcnemar_exact

from .report_samples import TASKS, answers, lm_eval_results, question, save_samples


def two(tmp_path, first, second, results=(None, None)):
    for name, samples, kept in zip(("a", "b"), (first, second), results, strict=True):
        save_evaluation(tmp_path / name, "fused", samples, kept or lm_eval_results())
    return tmp_path / "a", tmp_path / "b"


def test_difference_counts_and_tests_by_hand(tmp_path):
    # easy: 4 questions, second wins 2; hard: 2 questions, second loses 1 -> mean of tasks (2/4 - 1/2) / 2 = 0
    first = [question("easy", i, r) for i, r in enumerate((0, 0, 1, 0))] + [
        question("hard", i, r) for i, r in enumerate((1, 0))
    ]
    second = [question("easy", i, r) for i, r in enumerate((1, 1, 1, 0))] + [
        question("hard", i, r) for i, r in enumerate((0, 0))
    ]
    found = between_runs(*two(tmp_path, first, second))
    (row,) = found.models
    assert (row.name, row.metric, row.questions, row.only_first, row.only_second) == ("fused", "acc_norm", 6, 1, 2)
    assert row.difference.estimate == pytest.approx(0.0)
    assert row.p_value == mcnemar_exact(1, 2) == 1.0
    assert [(task.name, task.difference.estimate) for task in found.tasks] == [("easy", 0.5), ("hard", -0.5)]
    assert row.answer_nll is None


def test_means_over_models_are_tested_by_signs_of_their_size(tmp_path):
    # three models each: one question moves by 2/3, four by 1/3 the other way; as lost and won they would be 1 / 4
    first = [question("easy", i, value / 3) for i, value in enumerate((2, 0, 0, 0, 0))]
    second = [question("easy", i, value / 3) for i, value in enumerate((0, 1, 1, 1, 1))]
    found = between_runs(*two(tmp_path, first, second))
    (row,) = found.models
    assert (row.only_first, row.only_second, row.test) == (1, 4, "sign-flip")
    # of 32 signs of (-2, 1, 1, 1, 1), sum 2: as far from zero are those with a sum of 2 or more
    sums = [a * 2 + b + c + d + e for a, b, c, d, e in product((1, -1), repeat=5)]
    assert row.p_value == pytest.approx(sum(abs(one) >= 2 for one in sums) / 32)
    assert paired_table(found.models).head[5] == "sign-flip p"
    assert "McNemar" not in comparison_page("a", "b", found)


def test_a_page_by_likelihood_says_its_own_units_and_test(tmp_path):
    nlls = [[{**question("ward", i, 1, acc=None, acc_norm=None), "answer_nll": value + i} for i in range(4)]
            for value in (3.0, 2.5)]  # fmt: skip
    found = between_runs(*two(tmp_path, *nlls))
    page = comparison_page("a", "b", found)
    assert "answer_nll, mean over questions and tasks (below 0 is better)" in page
    assert "a sign-flip randomisation test" in page
    assert "oints" not in page
    assert "McNemar" not in page


def test_questions_are_paired_by_hash_whatever_their_order(tmp_path):
    samples = answers(0.5)
    shuffled = [{**sample, "answer_nll": sample["answer_nll"] + 1.0} for sample in samples[::-1]]
    (row,) = between_runs(*two(tmp_path, samples, shuffled)).models
    assert (row.only_first, row.only_second) == (0, 0)
    assert row.difference.low == row.difference.high == 0.0
    assert row.answer_nll.low == pytest.approx(1.0)


def test_models_that_answer_exactly_alike_are_named_and_not_tested(tmp_path):
    samples = answers(0.5)
    found = between_runs(*two(tmp_path, samples, samples[::-1]))
    assert (found.models, found.tasks, found.alike) == ([], [], ["fused"])
    page = comparison_page("a", "b", found)
    assert "to the last bit: fused." in page
    assert "|" not in page


def test_a_question_that_stands_twice_is_kept_twice(tmp_path):
    samples = [question("easy", 0, 1), question("easy", 0, 0), question("easy", 1, 0)]
    save_evaluation(tmp_path, "fused", samples, lm_eval_results())
    assert sorted(load_evaluation(tmp_path, "fused").values("easy", "acc")) == [0.0, 0.0, 1.0]


def test_models_against_target_are_holm_corrected_together(tmp_path):
    save_samples(tmp_path)
    rows = against_target(evaluations_of(tmp_path))
    assert [row.name for row in rows] == ["proxy", "proxy_tuned", "fused"]
    assert {row.name: row.holm_p_value for row in rows} == holm({row.name: row.p_value for row in rows})
    fused = rows[-1]
    assert fused.difference.low <= fused.difference.estimate <= fused.difference.high
    assert fused.only_first == 0  # a higher rate answers all that a lower one does, in these samples
    # answer_nll = 3 - rate + hardness: .40 against .55
    assert fused.answer_nll.estimate == pytest.approx(-0.15)
    assert fused.answer_nll.low == pytest.approx(-0.15)


def test_nothing_to_pair_without_target_samples(tmp_path):
    assert against_target(evaluations_of(tmp_path)) == []
    save_evaluation(tmp_path, "fused", answers(0.5), lm_eval_results())
    assert against_target(evaluations_of(tmp_path)) == []


def test_two_runs_are_compared_by_their_tuned_models(tmp_path):
    save_samples(tmp_path / "a")
    save_samples(tmp_path / "b", proxy_tuned=0.45, fused=0.7)
    found = between_runs(tmp_path / "a", tmp_path / "b")
    assert [row.name for row in found.models] == ["proxy_tuned", "fused"]
    assert [row.name for row in found.tasks] == list(TASKS)
    assert found.alike == ["target", "proxy"]
    assert found.models[-1].difference.estimate > 0
    table = paired_table(found.models)
    assert table.head[2:4] == ["acc_norm difference", "95 % interval"]
    assert table.head[-1] == "answer NLL difference (95 %)"


def test_accuracy_is_used_where_a_task_lacks_acc_norm(tmp_path):
    first, second = ([question("easy", i, i % by, acc_norm=None) for i in range(4)] for by in (2, 3))
    assert between_runs(*two(tmp_path, first, second)).models[0].metric == "acc"
    first, second = ([question("easy", 0, 1, acc=None, acc_norm=None, gold=gold)] for gold in (0, 1))
    folders = two(tmp_path, first, second)
    with pytest.raises(EvaluationError, match="in common, by which models can be paired"):
        between_runs(*folders)


@pytest.mark.parametrize(
    ("second", "results", "message"),
    [
        ([question("other", 0, 1)], None, "task easy is only in .*a fused; task other is only in .*b fused"),
        ([question("easy", 0, 1)], {"versions": {"easy": 2.0, "hard": 1.0}}, "easy has version 1.0 against 2.0"),
        ([question("easy", 0, 1)], {"n-shot": {"easy": 5, "hard": 0}}, "easy has num_fewshot 0 against 5"),
        ([question("easy", 0, 1)], {"lm_eval_version": "0.4.12"}, "easy has lm-eval 0.4.13 against 0.4.12"),
        ([question("easy", 0, 1)], {"configs": {"easy": {"a": 1}}}, "easy has configuration [0-9a-f]{12} against"),
        ([question("easy", 1, 1)], None, r"easy has 2 questions that only one of them answered \(1 against 1\)"),
        ([question("easy", 0, 1, prompt_hash="x")], None, "easy has other prompts at 1 of 1 questions"),
    ],
)
def test_other_tasks_versions_questions_and_prompts_are_refused(tmp_path, second, results, message):
    folders = two(tmp_path, [question("easy", 0, 1)], second, (None, results and lm_eval_results(**results)))
    with pytest.raises(EvaluationError, match=message) as caught:
        between_runs(*folders)
    assert "\n" not in str(caught.value)


def test_an_address_in_a_configuration_is_no_difference():
    first, second = (
        {"configs": {"easy": {"doc_to_text": f"<function text at 0x7f{end}>"}}} for end in ("01ab", "22cd")
    )
    assert task_settings(first) == task_settings(second)
    other = {"configs": {"easy": {"doc_to_text": "<function other at 0x7f01ab>"}}}
    assert task_settings(first)["easy"] != task_settings(other)["easy"]


def test_every_reason_is_named_at_once(tmp_path):
    first, second = two(
        tmp_path, [question("easy", 0, 1)], [question("easy", 1, 1)], (None, lm_eval_results(lm_eval_version="0.5"))
    )
    with pytest.raises(EvaluationError, match=r"has lm-eval 0\.4\.13 against 0\.5; easy has 2 questions"):
        require_comparable(load_evaluation(first, "fused"), load_evaluation(second, "fused"))


def test_runs_without_a_common_model_or_questions(tmp_path):
    save_evaluation(tmp_path / "a", "fused", answers(0.5), lm_eval_results())
    save_evaluation(tmp_path / "b", "proxy", answers(0.5), lm_eval_results())
    with pytest.raises(EvaluationError, match="share no model with kept samples"):
        between_runs(tmp_path / "a", tmp_path / "b")
    with pytest.raises(EvaluationError, match="there are no questions"):
        between_runs(*two(tmp_path, [], []))


def test_a_text_with_a_line_separator_is_one_sample(tmp_path):
    save_evaluation(tmp_path, "fused", [question("easy", 0, 1, said="a\u2028b\x85c")], lm_eval_results())
    assert load_samples(tmp_path, "fused")[0]["said"] == "a\u2028b\x85c"


def test_broken_files_are_named_with_their_line(tmp_path):
    save_evaluation(tmp_path, "fused", [question("easy", 0, 1)], lm_eval_results())
    path = tmp_path / "evaluation" / "fused.samples.jsonl"
    good = path.read_text()
    path.write_text(good + "{half\n")
    with pytest.raises(EvaluationError, match=r"fused.samples.jsonl line 2 cannot be used: it is not valid JSON"):
        load_evaluation(tmp_path, "fused")
    path.write_text(json.dumps({"task": "easy"}))
    with pytest.raises(EvaluationError, match=r"line 1 lacks doc_hash"):
        load_evaluation(tmp_path, "fused")
    for value in ("NaN", "-Infinity"):
        path.write_text(good.replace('"acc": 1', f'"acc": {value}'))
        with pytest.raises(EvaluationError, match=r"line 1: acc must be a number, got (nan|-inf); evaluate the run"):
            load_evaluation(tmp_path, "fused")
    path.write_text("[]")
    with pytest.raises(EvaluationError, match=r"line 1 cannot be used: it must hold an object, got list"):
        load_evaluation(tmp_path, "fused")
    path.write_text(good)
    (tmp_path / "evaluation" / "fused.json").write_text("[]")
    with pytest.raises(EvaluationError, match=r"fused.json is not an evaluation's result file"):
        load_evaluation(tmp_path, "fused")
    (tmp_path / "evaluation" / "fused.json").unlink()
    with pytest.raises(EvaluationError, match=r"cannot read .*fused.json"):
        load_evaluation(tmp_path, "fused")
