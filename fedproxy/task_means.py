"""The mean over tasks, with its standard error: one rule for evaluations, rounds and reports."""

import math
from collections.abc import Iterable, Mapping
from contextlib import suppress

Metrics = Mapping[str, float | None]
"""Metric name to value: ``acc``, ``acc_stderr``, ..., and ``n``, the number of questions."""


def mean_scores(scores_by_task: Mapping[str, Metrics]) -> dict[str, float | None]:
    """Return the unweighted mean over tasks of every metric that all of them have.

    ``n`` is summed. A mean's standard error is sqrt(sum of squared standard errors) / number of tasks, as the tasks'
    questions are independent samples. A metric that is None, NaN or infinite in a task, or has a sum that no number
    holds, is None in the mean.

    Args:
        scores_by_task: Task to metrics; an entry called ``mean`` is ignored.
    """
    tasks = [metrics for task, metrics in scores_by_task.items() if task != "mean"]
    if not tasks:
        return {}
    mean: dict[str, float | None] = {}
    for key in tasks[0]:
        if all(key in metrics for metrics in tasks):
            mean[key] = _combine(key, [metrics[key] for metrics in tasks])
    return mean


def _combine(key: str, values: list[float | None]) -> float | None:
    numbers = [value for value in values if value is not None and math.isfinite(value)]
    if len(numbers) < len(values):
        return None
    if key == "n":
        return sum(numbers)
    if key.endswith("_stderr"):
        with suppress(OverflowError):
            return math.sqrt(math.fsum(value**2 for value in numbers)) / len(numbers)
        return None
    return mean_known(numbers)


def mean_known(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are not None; None where there is none, or no number holds their sum."""
    known = [value for value in values if value is not None]
    with suppress(OverflowError):
        return math.fsum(known) / len(known) if known else None
    return None
