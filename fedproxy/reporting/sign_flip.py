"""A paired randomisation test on means over tasks, for answers averaged over seeds: McNemar's takes only 0 and 1."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

_CELLS_AT_ONCE = 4_000_000
"""Random signs held at a time; bounds the memory at about 40 MB."""


def sign_flip_test(
    differences_by_task: Sequence[ArrayLike], rng: np.random.Generator, resamples: int = 10_000
) -> float:
    """Return the two-sided p-value of the mean over tasks of paired differences (Fisher's randomisation test).

    Under the hypothesis that both models are alike, either of a question's two outcomes could have been either model's,
    so its difference may have the other sign. Signs are drawn at random; p = (1 + as extreme) / (1 + draws), which is
    never below the test's level (Phipson and Smyth 2010, arXiv 1603.05766).

    Args:
        differences_by_task: Per task, score of one model minus score of the other, one number per question.
        rng: Source of the signs; the same seed gives the same p.
        resamples: Number of draws.

    Raises:
        ValueError: If there is no task or a task has no question.
    """
    tasks = [np.asarray(values, dtype=np.float64) for values in differences_by_task]
    if not tasks or not all(values.size for values in tasks):
        raise ValueError("a randomisation test needs a question in every task, and a task")
    observed = abs(math.fsum(float(values.mean()) for values in tasks))
    drawn = np.zeros(resamples)
    for values in tasks:
        moved = values[values != 0]  # a difference of zero has no sign
        drawn += _signed_sums(moved, rng, resamples) / values.size
    extreme = int((np.abs(drawn) >= observed - 1e-12).sum())
    return (1 + extreme) / (1 + resamples)


def _signed_sums(values: NDArray[np.float64], rng: np.random.Generator, resamples: int) -> NDArray[np.float64]:
    if not values.size:
        return np.zeros(resamples)
    chunk = max(1, _CELLS_AT_ONCE // values.size)
    parts = []
    for start in range(0, resamples, chunk):
        signs = rng.integers(0, 2, size=(min(chunk, resamples - start), values.size), dtype=np.int8)
        parts.append(2.0 * (signs @ values) - values.sum())
    return np.concatenate(parts)
