"""The family of re-alignments, and what the server has to align with."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fedproxy.models import LayerMap
from fedproxy.registry import Component
from fedproxy.strategies.trainable.base import TrainableModel


@dataclass(frozen=True)
class Material:
    """What the server aligns with; clients have none of it."""

    target: PreTrainedModel
    """The server's LLM, frozen."""
    layer_map: LayerMap
    """From proxy blocks to target blocks."""
    batches: Sequence[dict[str, Tensor]]
    """Public text: ``input_ids`` and ``attention_mask``, int64 (batch, length), padded on the right."""
    trainer: Mapping[str, Any]
    """Options of lightning.Trainer."""
    logs: Path | None = None
    """Folder for what Lightning's loggers and profilers write."""


@dataclass(frozen=True)
class Realignment(Component, family="realignment"):
    """Brings the emulator (the proxy's blocks that no client trains) back to the target, before every broadcast."""

    parts: ClassVar[tuple[str, ...]] = ()
    """Round parts that it needs, by name."""

    @property
    def reads(self) -> tuple[int, int]:
        """Public texts that it needs, and how many of them go into a batch; (0, 0) where nothing is aligned."""
        return 0, 0

    @abstractmethod
    def align(
        self, model: TrainableModel, emulator: Sequence[int], material: Material, generator: torch.Generator
    ) -> float | None:
        """Change the emulator's weights in place, and nothing else.

        Args:
            model: The proxy, its trained part (the adapter) at the federation's current values.
            emulator: Indices of the proxy's blocks that are aligned.
            material: Target, layer map and public text.
            generator: CPU generator of every draw.

        Returns:
            The last steps' mean loss, or None where nothing is aligned.
        """
