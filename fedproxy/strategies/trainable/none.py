"""Nothing is trained: the zero-shot baseline."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fedproxy.strategies.trainable.base import Trainable, TrainableModel


class FrozenModel(TrainableModel):
    """A proxy without trainable parameters; its state is empty."""

    def merged_weights(self) -> Mapping[str, Tensor]:
        """Return nothing: no weight changed."""
        return {}

    def save_adapter(self, folder: str | Path, *, base: str | None = None) -> None:
        """Write nothing: there is no adapter."""


@dataclass(frozen=True)
class Nothing(Trainable, name="none"):
    """Trains nothing; for runs with federation.rounds = 0."""

    trains: ClassVar[bool] = False

    def attach(self, proxy: PreTrainedModel, generator: torch.Generator | None = None) -> FrozenModel:
        """Freeze the proxy."""
        proxy.requires_grad_(False)
        return FrozenModel(proxy, {})
