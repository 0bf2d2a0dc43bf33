import math

import numpy as np
import pytest
from scipy import stats

from fedproxy.reporting.statistics import (
    bootstrap_means,
    gain_recovered,
    holm,
    mcnemar_exact,
    mean_stderr,
    paired_bootstrap,
)


def rng(seed=0):
    return np.random.default_rng(seed)


def test_stderr_is_scipys_and_the_proportions_formula():
    values = rng().normal(size=37)
    assert mean_stderr(values) == pytest.approx(stats.sem(values))
    # 3 of 8: sqrt(3/8 * 5/8 / 7)
    assert mean_stderr([1, 1, 1, 0, 0, 0, 0, 0]) == pytest.approx(math.sqrt(15 / 64 / 7))
    assert math.isnan(mean_stderr([1.0]))


def test_stderr_is_lm_evals():
    from lm_eval.api.metrics import mean_stderr as theirs

    values = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    assert mean_stderr(values) == pytest.approx(theirs(values))


def test_mcnemar_by_hand_and_refusal():
    assert mcnemar_exact(1, 9) == pytest.approx(2 * (1 + 10) / 1024, rel=1e-12) == mcnemar_exact(9, 1)
    assert mcnemar_exact(0, 0) == mcnemar_exact(5, 5) == 1.0
    tail = sum(math.comb(1512, chosen) for chosen in range(701))
    assert mcnemar_exact(700, 812) == pytest.approx(2 * tail / 2**1512, rel=1e-9)
    with pytest.raises(ValueError, match="at least 0, got -1 and 3"):
        mcnemar_exact(-1, 3)


def test_holm_by_hand():
    # sorted .005 .01 .03 .04 times 4 3 2 1 = .02 .03 .06 .04; running maximum .02 .03 .06 .06 (as p.adjust in R)
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02}
    )
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def test_paired_bootstrap_is_close_to_scipys_percentile_interval():
    data = rng(3)
    first, second = data.normal(0.4, 1, 150), data.normal(0.0, 1, 150)
    ours = paired_bootstrap([first - second], rng(1), resamples=20_000)
    theirs = stats.bootstrap(
        (first, second), lambda a, b, axis: np.mean(a - b, axis=axis), paired=True, vectorized=True, n_resamples=20_000,
        method="percentile", rng=rng(2),
    ).confidence_interval  # fmt: skip
    assert ours.estimate == pytest.approx(np.mean(first - second))
    # two bootstraps of 20000: their bounds differ by Monte-Carlo error, sd about .0015 at this spread
    assert ours.low == pytest.approx(theirs.low, abs=0.01)
    assert ours.high == pytest.approx(theirs.high, abs=0.01)


def test_resampling_is_per_task_and_tasks_weigh_the_same():
    # 0/1 tasks of 200 and 50 questions, p = .5 and .2: sd of the mean of means sqrt(.25/200 + .16/50) / 2
    tasks = [np.repeat([0, 1], 100), np.repeat([0, 1], [40, 10])]
    means = bootstrap_means(tasks, rng(), 40_000)[:, 0]
    assert means.mean() == pytest.approx((0.5 + 0.2) / 2, abs=0.001)
    assert means.std() == pytest.approx(math.sqrt(0.25 / 200 + 0.16 / 50) / 2, rel=0.02)


def test_columns_of_a_question_are_drawn_together():
    scores = np.stack([np.repeat([0.0, 1.0], 50), np.repeat([0.0, 1.0], 50) + 0.25], axis=1)
    means = bootstrap_means([scores], rng(), 100)
    assert means[:, 1] - means[:, 0] == pytest.approx(np.full(100, 0.25))
    assert means[:, 0].std() > 0.01


def test_chunks_do_not_change_the_number_of_resamples(monkeypatch):
    monkeypatch.setattr("fedproxy.reporting.statistics._CELLS_AT_ONCE", 700)
    assert bootstrap_means([np.arange(100.0)], rng(), 25).shape == (25, 1)


def test_same_seed_same_interval_other_seed_another():
    difference = [rng(5).integers(-1, 2, 120)]
    assert paired_bootstrap(difference, rng(7)) == paired_bootstrap(difference, rng(7))
    assert paired_bootstrap(difference, rng(7), resamples=500) != paired_bootstrap(difference, rng(8), resamples=500)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    # 300 samples of 100 differences with true mean .1; 95 % intervals: binomial(300, .95) is within 270..297 at 4 sd
    data = rng(11)
    hits = 0
    for _ in range(300):
        found = paired_bootstrap([data.choice([-1, 0, 1], 100, p=[0.2, 0.5, 0.3])], data, resamples=1000)
        hits += found.low <= 0.1 <= found.high
    assert 270 <= hits <= 297


def test_one_question_and_no_question():
    assert paired_bootstrap([[1.0]], rng(), resamples=10).low == 1.0
    with pytest.raises(ValueError, match="a task without questions"):
        paired_bootstrap([[]], rng())
    with pytest.raises(ValueError, match="at least one task"):
        paired_bootstrap([], rng())


def test_share_of_gain_is_exact_where_models_are_functions_of_each_other():
    # method = target + half of what the ceiling adds, question by question: .5 in every resample
    target = [rng(1).integers(0, 2, 80).astype(float), rng(2).integers(0, 2, 40).astype(float)]
    ceiling = [task + 1.0 for task in target]
    method = [task + 0.5 for task in target]
    found = gain_recovered(target, method, ceiling, rng())
    assert (found.estimate, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))


def test_share_of_gain_interval_agrees_with_the_delta_method():
    # y = method - target, x = ceiling - target, share R = mean y / mean x; var R ~ var(y - R x) / (n mean(x)^2)
    data = rng(4)
    target, gain = data.normal(0, 1, 1000), data.normal(1.0, 0.5, 1000)
    part = 0.7 * gain + data.normal(0, 0.3, 1000)
    found = gain_recovered([target], [target + part], [target + gain], rng(), resamples=20_000)
    share = part.mean() / gain.mean()
    stderr = (part - share * gain).std() / math.sqrt(1000) / gain.mean()
    assert found.estimate == pytest.approx(share)
    assert found.low == pytest.approx(share - 1.96 * stderr, abs=0.1 * stderr)
    assert found.high == pytest.approx(share + 1.96 * stderr, abs=0.1 * stderr)


def test_share_of_a_gain_within_noise_is_unbounded_and_of_no_gain_is_none():
    noisy = np.array([1.0] * 51 + [-1.0] * 49)
    zero = np.zeros(100)
    found = gain_recovered([zero], [zero + 0.01], [noisy], rng())
    assert (found.low, found.high) == (-math.inf, math.inf)
    assert gain_recovered([noisy], [noisy], [noisy], rng()) is None
