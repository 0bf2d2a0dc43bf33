from itertools import product

import numpy as np
import pytest
from scipy.stats import binomtest

from fedproxy.reporting.statistics import sign_flip_test


def test_all_signs_of_few_questions_are_tried():
    changes = np.array([1.0, 0.5, -0.5, 1.0, 0.0, 1.0, 0.5, -1.0])
    sums = [abs(np.dot(signs, changes)) for signs in product((-1, 1), repeat=8)]
    expected = np.mean(np.array(sums) >= changes.sum() - 1e-12)
    assert sign_flip_test([changes], np.random.default_rng(0)) == pytest.approx(expected, abs=1e-12)


def test_zero_one_answers_give_mcnemars_exact_test():
    # 12 questions won, 3 lost: under the hypothesis a fair coin over 15
    changes = np.repeat([1.0, -1.0, 0.0], [12, 3, 25])
    exact = binomtest(3, 15, 0.5).pvalue
    assert sign_flip_test([changes], np.random.default_rng(1), resamples=40_000) == pytest.approx(exact, abs=0.005)


def test_tasks_weigh_the_same_whatever_their_size():
    # mean over tasks of +1 and -1/100 * 50: (1 - .5) / 2; only when the first task's single question keeps its sign
    # (or all flips) is |sum| as large, unless the 50 flips do it: the p-value is far from that of the pooled questions
    small, large = np.ones(1), np.repeat([-1.0, 0.0], [50, 50])
    rng = np.random.default_rng(2)
    signs_small, signs_large = rng.choice([-1, 1], (200_000, 1)), rng.choice([-1, 1], (200_000, 50))
    drawn = signs_small[:, 0] - signs_large.sum(axis=1) / 100
    expected = np.mean(np.abs(drawn) >= 0.5 - 1e-12)
    assert sign_flip_test([small, large], np.random.default_rng(3), resamples=40_000) == pytest.approx(
        expected, abs=0.01
    )


def test_no_difference_is_p_1_and_the_same_seed_the_same_p():
    assert sign_flip_test([np.zeros(5)], np.random.default_rng(0)) == 1.0
    assert sign_flip_test([np.zeros(5), np.ones(1)], np.random.default_rng(0)) == 1.0
    assert sign_flip_test([np.array([0.5, 0.25])], np.random.default_rng(0)) == 0.5
    changes = [np.random.default_rng(4).normal(0.1, 1, 30)]
    p, again = (sign_flip_test(changes, np.random.default_rng(5)) for _ in range(2))
    assert p == again
    assert 0 < p < 1


@pytest.mark.parametrize("tasks", [[], [np.ones(3), np.ones(0)]])
def test_nothing_to_test_is_an_error(tasks):
    with pytest.raises(ValueError, match="needs a question in every task"):
        sign_flip_test(tasks, np.random.default_rng(0))
