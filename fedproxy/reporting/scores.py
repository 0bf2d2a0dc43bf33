"""Means over tasks, and the headline: what fusion gains over the untuned target."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

MODELS = ("target", "proxy", "proxy_tuned", "fused")
"""Models of a report, in the order in which a run makes them."""

Metrics = Mapping[str, float | None]
"""Metric name to value: ``acc``, ``acc_stderr``, ..., and ``n``, the number of questions."""


def mean_scores(scores_by_task: Mapping[str, Metrics]) -> dict[str, float | None]:
    """Return the unweighted mean over tasks of every metric that all of them have.

    ``n`` is summed. A mean's standard error is sqrt(sum of squared standard errors) / number of tasks, as the tasks'
    questions are independent samples. A metric that is None or NaN in a task is None in the mean.

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
        return math.sqrt(math.fsum(value**2 for value in numbers)) / len(numbers)
    return math.fsum(numbers) / len(numbers)


def with_means(scores: Mapping[str, Mapping[str, Metrics]]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Return ``scores`` (model to task to metrics) with each model's ``mean`` added or renewed."""
    return {
        model: {
            **{task: dict(metrics) for task, metrics in tasks.items() if task != "mean"},
            "mean": mean_scores(tasks),
        }
        for model, tasks in scores.items()
    }


@dataclass(frozen=True)
class Value:
    """A score and its standard error, both as fractions."""

    value: float
    stderr: float | None = None

    def minus(self, other: "Value") -> "Value":
        """Return the difference, its standard error that of independent samples (too wide for one question set)."""
        both = self.stderr is not None and other.stderr is not None
        return Value(self.value - other.value, math.hypot(self.stderr or 0.0, other.stderr or 0.0) if both else None)


def value_of(metrics: Metrics | None, metric: str) -> Value | None:
    """Return ``metric`` of ``metrics`` with its standard error, or None where there is none."""
    value = (metrics or {}).get(metric)
    if value is None or not math.isfinite(value):
        return None
    stderr = (metrics or {}).get(f"{metric}_stderr")
    return Value(value, stderr if stderr is not None and math.isfinite(stderr) else None)


def headline_metric(scores: Mapping[str, Mapping[str, Metrics]]) -> str | None:
    """Return ``acc_norm`` if every model's mean has it, else ``acc``, else None."""
    means = [tasks.get("mean") for tasks in scores.values()]
    for metric in ("acc_norm", "acc"):
        if means and all(value_of(mean, metric) for mean in means):
            return metric
    return None


def task_metric(scores: Mapping[str, Mapping[str, Metrics]], task: str) -> str | None:
    """Return the metric that ``task`` is shown by: ``acc_norm``, else ``acc``, else the first with a value."""
    for metrics in (tasks[task] for tasks in scores.values() if task in tasks):
        for metric in ("acc_norm", "acc", *metrics):
            if metric != "n" and not metric.endswith("_stderr") and value_of(metrics, metric):
                return metric
    return None


def task_names(scores: Mapping[str, Mapping[str, Metrics]]) -> list[str]:
    """Return every task of ``scores`` in order of first appearance, without ``mean``."""
    return list(dict.fromkeys(task for tasks in scores.values() for task in tasks if task != "mean"))
