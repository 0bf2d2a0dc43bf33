"""Standard errors, paired tests and intervals for scores of models on the same questions. Pure functions."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
_CELLS_AT_ONCE = 4_000_000
"""Numbers that the bootstrap holds at a time; bounds its memory at about 100 MB."""


@dataclass(frozen=True)
class Interval:
    """An estimate and its bootstrap percentile interval; a bound is infinite where the data set none."""

    estimate: float
    low: float
    high: float


def mean_stderr(values: ArrayLike) -> float:
    """Return the standard error of a mean as lm-eval has it: sample standard deviation / sqrt(n); NaN for one value.

    For 0/1 outcomes with mean p this is sqrt(p (1 - p) / (n - 1)).
    """
    data = np.asarray(values, dtype=np.float64)
    return float(data.std(ddof=1) / math.sqrt(data.size)) if data.size > 1 else math.nan


def bootstrap_means(values_by_task: Sequence[ArrayLike], rng: np.random.Generator, resamples: int = 10_000) -> Floats:
    """Return bootstrapped means over tasks of the mean over questions.

    Questions are drawn with replacement within each task, all columns of a question together, so that columns (models)
    stay paired. Where few distinct rows occur, as with 0/1 outcomes, how often each is drawn is one multinomial draw:
    the same distribution as drawing indices, and far cheaper.

    Args:
        values_by_task: Per task an array (questions, columns) or (questions,).
        rng: Source of the draws.
        resamples: Number of bootstrap samples.

    Returns:
        float64 (resamples, columns).

    Raises:
        ValueError: If there is no task or a task has no question.
    """
    if not values_by_task:
        raise ValueError("a bootstrap needs at least one task")
    total: Floats | None = None
    for values in values_by_task:
        means = _resampled_means(_columns(values), rng, resamples)
        total = means if total is None else total + means
    assert total is not None  # the loop ran
    return total / len(values_by_task)


def _columns(values: ArrayLike) -> Floats:
    data = np.asarray(values, dtype=np.float64)
    data = data[:, None] if data.ndim == 1 else data
    if not len(data):
        raise ValueError("a task without questions cannot be resampled")
    return data


def _resampled_means(data: Floats, rng: np.random.Generator, resamples: int) -> Floats:
    size = len(data)
    distinct, counts = np.unique(data, axis=0, return_counts=True)
    few = len(distinct) * 8 < size
    chunk = max(1, _CELLS_AT_ONCE // (len(distinct) if few else size * data.shape[1]))
    parts = []
    for start in range(0, resamples, chunk):
        draws = min(chunk, resamples - start)
        if few:
            parts.append(rng.multinomial(size, counts / size, size=draws) @ distinct / size)
        else:
            parts.append(data[rng.integers(size, size=(draws, size))].mean(axis=1))
    return np.concatenate(parts)


def paired_bootstrap(
    differences_by_task: Sequence[ArrayLike],
    rng: np.random.Generator,
    *,
    resamples: int = 10_000,
    confidence: float = 0.95,
) -> Interval:
    """Return the mean over tasks of per-question differences with its percentile interval (Efron 1979).

    Stratified by task: each task keeps its number of questions and all tasks weigh the same. For one pooled sample pass
    one task.

    Args:
        differences_by_task: Per task, score of one model minus score of the other, one number per question.
        rng: Source of the draws; the same seed gives the same interval.
        resamples: Number of bootstrap samples.
        confidence: Coverage aimed at.
    """
    means = bootstrap_means(differences_by_task, rng, resamples)[:, 0]
    estimate = float(np.mean([np.mean(np.asarray(task, dtype=np.float64)) for task in differences_by_task]))
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(estimate, float(low), float(high))


def gain_recovered(
    target: Sequence[ArrayLike],
    method: Sequence[ArrayLike],
    ceiling: Sequence[ArrayLike],
    rng: np.random.Generator,
    *,
    resamples: int = 10_000,
    confidence: float = 0.95,
) -> Interval | None:
    """Return the share (method - target) / (ceiling - target) of the ceiling's gain, on the same questions.

    Resamples where the ceiling gains nothing have no share; they count as minus infinity for the lower and as plus
    infinity for the upper bound, so that a gain within noise ends in an unbounded interval and not in a narrow one.

    Args:
        target: Per task the target's scores, one per question.
        method: The same for the model asked about.
        ceiling: The same for the upper bound, e.g. centralised tuning.
        rng: Source of the draws.
        resamples: Number of bootstrap samples.
        confidence: Coverage aimed at.

    Returns:
        None if the ceiling does not gain over the target.
    """
    columns = [
        np.stack([np.asarray(v, dtype=np.float64) for v in rows], axis=1)
        for rows in zip(target, method, ceiling, strict=True)
    ]
    base, reached, top = np.mean([data.mean(axis=0) for data in columns], axis=0)
    if top <= base:
        return None
    means = bootstrap_means(columns, rng, resamples)
    gain = means[:, 2] - means[:, 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        share = (means[:, 1] - means[:, 0]) / gain
    low = np.quantile(np.where(gain > 0, share, -np.inf), (1 - confidence) / 2, method="lower")
    high = np.quantile(np.where(gain > 0, share, np.inf), (1 + confidence) / 2, method="higher")
    return Interval(float((reached - base) / (top - base)), float(low), float(high))


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Return McNemar's exact two-sided p-value (McNemar 1947): a fair coin over the questions that one model alone got.

    Args:
        only_first: Questions that only the first model answered rightly.
        only_second: Questions that only the second did.

    Raises:
        ValueError: If a count is negative.
    """
    if min(only_first, only_second) < 0:
        raise ValueError(f"counts must be at least 0, got {only_first} and {only_second}")
    from scipy.stats import binomtest

    total = only_first + only_second
    return float(binomtest(only_first, total).pvalue) if total else 1.0


def sign_flip_test(
    differences_by_task: Sequence[ArrayLike], rng: np.random.Generator, resamples: int = 10_000
) -> float:
    """Return the two-sided p-value of the mean over tasks of paired differences (Fisher's randomisation test).

    For answers averaged over seeds, where McNemar's test takes only 0 and 1. Under the hypothesis that both models are
    alike, a question's two outcomes could have been either model's, so its difference may have the other sign. Signs
    are drawn at random, or all are tried where there are no more than ``resamples``; p is never below the test's level
    (Phipson and Smyth 2010, arXiv 1603.05766).

    Args:
        differences_by_task: Per task, score of one model minus score of the other, one number per question.
        rng: Source of the signs; the same seed gives the same p.
        resamples: Number of draws.

    Raises:
        ValueError: If there is no task or a task has no question.
    """
    from scipy.stats import permutation_test

    tasks = [np.asarray(values, dtype=np.float64) for values in differences_by_task]
    if not tasks or not all(values.size for values in tasks):
        raise ValueError("a randomisation test needs a question in every task, and a task")
    shares = np.concatenate([values / values.size for values in tasks])
    shares = shares[shares != 0]  # a difference of zero has no sign
    if shares.size < 2:  # either sign of a single one is as far from zero
        return 1.0
    found = permutation_test(
        (shares,),
        lambda drawn, axis: drawn.sum(axis=axis),
        permutation_type="samples",
        n_resamples=resamples,
        batch=max(1, _CELLS_AT_ONCE // shares.size),
        vectorized=True,
        rng=rng,
    )
    return float(found.pvalue)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return Holm's step-down adjusted p-values (Holm 1979), by name in the order given."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}
