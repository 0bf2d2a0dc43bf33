"""Huber's mean of client updates (Huber 1964): near the median every client counts, far from it only its direction."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedproxy.strategies.aggregators import Aggregator


def huber_mean(deltas: Tensor, bound: float) -> Tensor:
    """Return one step of Huber's estimator from the median m: m + mean over clients of clip(delta - m, +-bound * s).

    s is the median of |delta - m|, times 1.4826, which makes it the standard deviation of Gaussian updates.

    Args:
        deltas: Updates, float32 (clients, n).
        bound: Deviations beyond so many s count as that many, > 0.

    Returns:
        float32 (n,).
    """
    centre = deltas.median(dim=0).values
    away = deltas - centre
    most = bound * 1.4826 * away.abs().median(dim=0).values
    return centre + away.clamp(-most, most).mean(dim=0)


@dataclass(frozen=True)
class Huber(Aggregator, name="huber"):
    """Mean of updates in which a client far from the median counts as one that is ``bound`` deviations away."""

    coordinatewise: ClassVar[bool] = True

    bound: float = 1.5
    """Deviations from the median, in robust standard deviations, beyond which an update is cut, > 0."""

    def __post_init__(self) -> None:
        """Check the options."""
        self.require("bound", self.bound > 0, "more than 0")

    def combine(self, deltas: Tensor, weights: Tensor) -> Tensor:
        """Merge pieces of all clients' updates, float32 (clients, n)."""
        return huber_mean(deltas, self.bound)
