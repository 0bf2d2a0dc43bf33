"""No re-alignment."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedproxy.strategies.realignment.base import Material, Realignment
from fedproxy.strategies.trainable.base import TrainableModel


@dataclass(frozen=True)
class NoRealignment(Realignment, name="none"):
    """Frozen blocks stay as they were sent with the proxy."""

    def align(
        self, model: TrainableModel, emulator: Sequence[int], material: Material, generator: torch.Generator
    ) -> float | None:
        """Do nothing."""
        return None
