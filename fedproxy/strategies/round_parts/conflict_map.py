"""The conflict map C of the previous round, which the regularizer ``conflict`` reads (FedProxy Eqs 7 and 9)."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedproxy.protocol import Broadcast, Tensors
from fedproxy.strategies.round_parts.base import ClientRound, Forms, RoundPart, RoundResult


@dataclass(frozen=True)
class ConflictMap(RoundPart, name="conflict"):
    """Sends C of the previous round, float32 per coordinate of the shared state; nothing in the first round."""

    order: ClassVar[int] = 30
    server_copies: ClassVar[int] = 2
    host_copies: ClassVar[int] = 1
    device_copies: ClassVar[int] = 1

    def send(self, broadcast: Broadcast, memory: Tensors) -> Broadcast:
        """Add C, if there is one."""
        return replace(broadcast, extras={**broadcast.extras, self.name: memory}) if memory else broadcast

    def receive(self, task: ClientRound) -> None:
        """Hand C to the regularizer."""
        task.conflict = task.broadcast.extras.get(self.name)

    def collect(self, memory: Tensors, result: RoundResult) -> Tensors:
        """Keep the round's C."""
        return dict(result.aggregation.conflict or {})

    def remembers(self, forms: Forms) -> Tensors:
        """Return float32 per coordinate of what clients send."""
        return {n: torch.empty_like(t, dtype=torch.float32) for n, t in forms.up["delta"].tensors.items()}
