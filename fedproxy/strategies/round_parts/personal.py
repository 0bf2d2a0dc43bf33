"""Tensors of the state that every client keeps to itself: FedSA-LoRA's B."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch

from fedproxy.protocol import Broadcast, ClientUpdate, Tensors
from fedproxy.strategies.round_parts.base import ClientRound, Group, RoundPart, Rules
from fedproxy.strategies.trainable.base import TrainableModel


@dataclass(frozen=True)
class Personal(RoundPart, name="personal"):
    """Leaves personal tensors out of broadcasts and updates; a client goes on from its own last values."""

    order: ClassVar[int] = 20

    tensors: tuple[str, ...] = ()
    """The personal tensors."""

    @classmethod
    def of(cls, rules: Rules) -> Self:
        """Take what the aggregator does not share."""
        return cls(tuple(name for name in rules.model.parameters() if not rules.aggregator.shares(name)))

    def send(self, broadcast: Broadcast, memory: Tensors) -> Broadcast:
        """Leave the personal tensors out."""
        return replace(broadcast, state={n: broadcast.state[n] for n in broadcast.state if n not in self.tensors})

    def receive(self, task: ClientRound) -> None:
        """Complete the state by the client's own tensors; what is personal conflicts with nothing."""
        own = task.memory.get(self.name, {})
        task.state |= {name: own.get(name, task.initial[name]) for name in self.tensors}
        if task.conflict:
            task.conflict = {**task.conflict, **{name: torch.zeros_like(task.state[name]) for name in self.tensors}}

    def reply(self, task: ClientRound, update: ClientUpdate) -> ClientUpdate:
        """Keep the personal tensors and send the rest."""
        tuned = task.model.state()
        task.kept[self.name] = {name: tuned[name].clone() for name in self.tensors}
        return replace(update, delta={name: update.delta[name] for name in update.delta if name not in self.tensors})

    def expects(self, up: Mapping[str, Group], model: TrainableModel, client_id: str = "") -> Mapping[str, Group]:
        """Leave the personal tensors out."""
        shared = {name: tensor for name, tensor in up["delta"].tensors.items() if name not in self.tensors}
        return {**up, "delta": replace(up["delta"], tensors=shared)}
