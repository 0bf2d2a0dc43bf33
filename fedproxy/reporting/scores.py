"""Scores with their means over tasks, and the headline: what fusion gains over the untuned target."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fedproxy.metric_facts import HEADLINES, headline_of
from fedproxy.task_means import Metrics, mean_scores

ACCURACIES = ("acc_norm", "acc")
"""Accuracies, the one that is shown first where there are both."""
MODELS = ("target", "proxy", "proxy_tuned", "fused")
"""Models of a report, in the order in which a run makes them."""


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
    """Return the first of :data:`fedproxy.metric_facts.HEADLINES` that every model's mean has, else None."""
    means = [tasks.get("mean") for tasks in scores.values()]
    return headline_of(metric for metric in HEADLINES if means and all(value_of(mean, metric) for mean in means))


def task_metric(scores: Mapping[str, Mapping[str, Metrics]], task: str) -> str | None:
    """Return the metric that ``task`` is shown by: the first headline that it has, else the first with a value."""
    for metrics in (tasks[task] for tasks in scores.values() if task in tasks):
        for metric in (*HEADLINES, *metrics):
            if metric != "n" and not metric.endswith("_stderr") and value_of(metrics, metric):
                return metric
    return None


def task_names(scores: Mapping[str, Mapping[str, Metrics]]) -> list[str]:
    """Return every task of ``scores`` in order of first appearance, without ``mean``."""
    return list(dict.fromkeys(task for tasks in scores.values() for task in tasks if task != "mean"))
