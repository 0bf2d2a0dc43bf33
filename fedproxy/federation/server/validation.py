"""Validation between rounds: when the state is scored, what a record says of it, and which round is the best."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedproxy.federation.server.checkpoint import CheckpointFolder, Progress
from fedproxy.metric_facts import facts

Scores = Mapping[str, Mapping[str, float | None]]
"""Source, and ``mean``, to metric to value."""


@dataclass(frozen=True)
class RoundValidation:
    """Scores the server's state every few rounds on rows that no client owns."""

    score: Callable[[Mapping[str, Tensor]], Scores]
    """Scores a trainable state."""
    every: int
    """Rounds from one validation to the next, at least 1."""
    metric: str
    """Mean score by which rounds are compared."""
    keep_best: bool
    """Whether the best round's state is kept and used, instead of the last one's."""

    def record(self, round_: int, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return what a round's record says of validation: nothing in rounds without one."""
        if round_ % self.every:
            return {}
        started = time.perf_counter()
        scores = self.score(state)
        return {"validation": scores, "validation_seconds": time.perf_counter() - started}

    def pinned(self, records: Sequence[Mapping[str, Any]]) -> int | None:
        """Return the round whose checkpoint must stay, or None."""
        return best_round(records, self.metric) if self.keep_best else None

    def chosen(self, progress: Progress, checkpoints: CheckpointFolder) -> Progress:
        """Return the progress to go on to fusion with: that after the best round, or ``progress`` itself.

        Raises:
            CheckpointError: If the best round's checkpoint is gone or damaged.
        """
        best = self.pinned(progress.records)
        return progress if best is None or best == progress.round else checkpoints.load(best)


def best_round(records: Sequence[Mapping[str, Any]], metric: str) -> int | None:
    """Return the round with the best mean ``metric``, the earliest of equals; None where no round has a finite one."""
    sign = -1 if facts(metric).higher_is_better else 1
    known = [
        (sign * value, record["round"])
        for record in records
        if (value := mean_score(record, metric)) is not None and math.isfinite(value)
    ]
    return min(known)[1] if known else None


def mean_score(record: Mapping[str, Any], metric: str) -> float | None:
    """Return a round's mean validation score, or None where it has none."""
    scores: Scores = record.get("validation") or {}
    return scores.get("mean", {}).get(metric)
