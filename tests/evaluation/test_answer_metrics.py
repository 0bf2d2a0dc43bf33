import math

import pytest
import torch

from fedproxy.evaluation.answer_metrics import choice_margin, score_answers

# Question 1: choices e^-1 : e^-2 : e^-3, gold 0 (two tokens). Question 2: e^-4 : e^-3, gold 0 (one token), so wrong.
QUESTIONS = [([-1.0, -2.0, -3.0], 0, 2), ([-4.0, -3.0], 0, 1)]
P1 = 1 / (1 + math.exp(-1) + math.exp(-2))  # softmax of the first choice of question 1, 0.665
P2 = 1 / (1 + math.exp(-1))  # of the second choice of question 2, 0.731


def test_nll_is_per_token_and_per_answer():
    scores = score_answers(QUESTIONS)
    assert scores["answer_nll"] == pytest.approx((1 + 4) / (2 + 1))
    assert scores["answer_nll_total"] == pytest.approx((1 + 4) / 2)


def test_margin_is_the_gold_probability_minus_the_best_other():
    expected = [P1 - P1 * math.exp(-1), (1 - P2) - P2]
    margins = [float(choice_margin(torch.tensor(values), gold)) for values, gold, _ in QUESTIONS]
    assert margins == pytest.approx(expected)
    assert score_answers(QUESTIONS)["margin"] == pytest.approx(sum(expected) / 2, abs=1e-6)


def test_calibration_error_weighs_the_gap_of_each_bin():
    # Bins of width 1/15: 0.665 is in the tenth, 0.731 in the eleventh; gaps |1 - P1| and |0 - P2|, a question each.
    assert score_answers(QUESTIONS)["ece"] == pytest.approx(((1 - P1) + P2) / 2, abs=1e-6)
    # In one bin gaps cancel: two questions answered with confidence P2, one right and one wrong.
    same_bin = [([-4.0, -3.0], 0, 1), ([-4.0, -3.0], 1, 1)]
    assert score_answers(same_bin)["ece"] == pytest.approx(abs(0.5 - P2), abs=1e-6)


def test_very_unlikely_answers_stay_finite():
    scores = score_answers([([-2000.0, -1000.0], 0, 4)])
    assert scores["answer_nll"] == pytest.approx(500)
    assert scores["margin"] == pytest.approx(-1)
    assert all(math.isfinite(value) for value in scores.values())
