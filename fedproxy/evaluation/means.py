"""Scores of several models on the same questions as one: the mean over models, question by question."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedproxy.errors import EvaluationError

Scores = Mapping[str, Mapping[str, float | None]]
Sample = Mapping[str, Any]

_SAME = ("task", "doc_id", "doc_hash", "prompt_hash", "gold", "answer_tokens")


def mean_over_models(
    scores: Sequence[Scores], samples: Sequence[Sequence[Sample]]
) -> tuple[dict[str, Mapping[str, float | None]], list[dict[str, Any]]]:
    """Return the mean of several models' scores, and of their samples.

    A question's ``acc`` becomes the share of models that got it right, so that a paired comparison still pairs
    questions. The standard error is taken over questions of these shares: models that answer the same questions are no
    independent samples of them.

    Args:
        scores: Per model, task to metric to value.
        samples: Per model, one record per question, the questions in one order.

    Raises:
        EvaluationError: If the models answered different questions.
    """
    means = [_mean_sample(rows) for rows in zip(*samples, strict=False)]
    if any(len(own) != len(means) for own in samples):
        raise EvaluationError("the clients' models answered different numbers of questions; evaluate the run again")
    found: dict[str, Mapping[str, float | None]] = {}
    for task, metrics in scores[0].items():
        own = [sample for sample in means if sample["task"] == task]
        shared = [key for key in metrics if all(key in other[task] for other in scores)]
        mean = {key: _mean([other[task][key] for other in scores]) for key in shared}
        for key in shared:
            if key.endswith("_stderr") and (error := _standard_error(own, key.removesuffix("_stderr"))) is not None:
                mean[key] = error
        found[task] = mean
    return found, means


def _mean_sample(rows: Sequence[Sample]) -> dict[str, Any]:
    first = rows[0]
    if any(row.get(key) != first.get(key) for row in rows for key in ("task", "doc_hash")):
        raise EvaluationError(f"the clients' models answered different questions of {first['task']}; evaluate again")
    mean = {key: first[key] for key in _SAME if key in first}
    for key, value in first.items():
        if key not in mean and isinstance(value, int | float):
            mean[key] = _mean([row.get(key) for row in rows])
    return mean


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean, or None where a model's figure is none: it was not a number."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def _standard_error(samples: Sequence[Sample], metric: str) -> float | None:
    if len(samples) < 2 or any(sample.get(metric) is None for sample in samples):
        return None
    values = [float(sample[metric]) for sample in samples]
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
