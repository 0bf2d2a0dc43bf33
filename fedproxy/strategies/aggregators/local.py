"""No aggregation: the local-only baseline."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedproxy.strategies.aggregators.base import Aggregator


@dataclass(frozen=True)
class LocalOnly(Aggregator, name="none"):
    """Every client keeps its own state; ``aggregate`` takes one client and returns its update unchanged."""

    reference: ClassVar[str] = "the local-only baseline"
    aggregates: ClassVar[bool] = False
    coordinatewise: ClassVar[bool] = True

    def combine(self, deltas: Tensor, weights: Tensor) -> Tensor:
        """Return the only client's values."""
        return deltas[0]
