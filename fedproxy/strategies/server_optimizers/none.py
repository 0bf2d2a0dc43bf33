"""The merged update as it is."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedproxy.strategies.server_optimizers.base import ServerOptimizer


@dataclass(frozen=True)
class NoServerOptimizer(ServerOptimizer, name="none"):
    """phi^{t+1} = phi^t + Delta."""

    reference: ClassVar[str] = "phi + Delta"

    def update(self, delta: Tensor, slots: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the update itself."""
        return delta, {}
