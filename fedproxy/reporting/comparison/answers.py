"""A method's answers over its seeds: averaged per question, so that methods pair up question by question."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedproxy.metric_facts import HEADLINES, headline_of
from fedproxy.reporting.comparison.records import Record
from fedproxy.reporting.statistics import mean_stderr

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Score:
    """A mean and how far it can be trusted."""

    value: float
    stderr_questions: float | None
    """Over questions, of the answers averaged over seeds; None for one question."""
    stderr_seeds: float | None
    """Sample standard deviation of the seeds' means over the square root of their number; None for one seed."""
    by_seed: Mapping[str, float]


def common_metric(records: Iterable[Record]) -> str | None:
    """Return the first of :data:`fedproxy.metric_facts.HEADLINES` that every question of every model has, or None."""
    tables = [own.values for record in records for tasks in record.answers.values() for own in tasks.values()]
    return headline_of(metric for metric in HEADLINES if tables and all(metric in values for values in tables))


def answers_of(records: Sequence[Record], model: str, metric: str) -> dict[str, Floats]:
    """Return per task the answers, float64 (questions, seeds).

    Args:
        records: One per seed.
        model: Whose answers.
        metric: Which all of them have.
    """
    return {
        task: np.stack([np.asarray(record.answers[model][task].values[metric]) for record in records], axis=1)
        for task in sorted(records[0].answers[model])
    }


def over_seeds(answers: Mapping[str, Floats]) -> list[Floats]:
    """Return per task the answers averaged over seeds, (questions,): what the functions of ``statistics`` take."""
    return [answers[task].mean(axis=1) for task in sorted(answers)]


def task_scores(answers: Mapping[str, Floats], seeds: Sequence[int]) -> dict[str, Score]:
    """Return every task's score, and the unweighted mean over tasks under ``mean``.

    The mean's standard error over questions is sqrt(sum of squares) / tasks: tasks are independent samples.
    """
    scores = {
        task: _score(values.mean(axis=0), mean_stderr(values.mean(axis=1)), seeds) for task, values in answers.items()
    }
    means = np.stack([values.mean(axis=0) for values in answers.values()]).mean(axis=0)
    errors = [score.stderr_questions for score in scores.values()]
    known = [error for error in errors if error is not None]
    whole = math.sqrt(math.fsum(error**2 for error in known)) / len(errors) if len(known) == len(errors) else math.nan
    return {**scores, "mean": _score(means, whole, seeds)}


def _score(by_seed: Floats, stderr: float, seeds: Sequence[int]) -> Score:
    return Score(
        float(by_seed.mean()),
        stderr if math.isfinite(stderr) else None,
        mean_stderr(by_seed) if len(by_seed) > 1 else None,
        {str(seed): float(value) for seed, value in zip(seeds, by_seed, strict=True)},
    )
