"""What a regularizer remembers across rounds: SCAFFOLD's control variates, FedDyn's gradients."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Self

import torch

from fedproxy.errors import ClientError
from fedproxy.protocol import Broadcast, ClientUpdate, Tensors
from fedproxy.strategies.regularizers import Regularizer
from fedproxy.strategies.round_parts.base import ClientRound, Forms, Group, RoundPart, RoundResult, Rules
from fedproxy.strategies.trainable.base import TrainableModel


@dataclass(frozen=True)
class ControlVariates(RoundPart, name="control_variates"):
    """Keeps a regularizer's memory with the client and, where the rule has one, its other half with the server."""

    order: ClassVar[int] = 10
    server_copies: ClassVar[int] = 1
    host_copies: ClassVar[int] = 2
    device_copies: ClassVar[int] = 1

    regularizer: Mapping[str, Any] = field(default_factory=lambda: {"name": "none"})
    """Name and options of the regularizer."""

    @classmethod
    def of(cls, rules: Rules) -> Self:
        """Take the run's regularizer."""
        options = {item.name: getattr(rules.regularizer, item.name) for item in fields(rules.regularizer)}
        return cls({"name": rules.regularizer.name, **options})

    @property
    def term(self) -> Regularizer:
        """The regularizer."""
        return Regularizer.made(self.regularizer)

    def send(self, broadcast: Broadcast, memory: Tensors) -> Broadcast:
        """Add the server's half, if it has one."""
        return replace(broadcast, extras={**broadcast.extras, self.name: memory}) if memory else broadcast

    def receive(self, task: ClientRound) -> None:
        """Work out the constant gradient of this round."""
        task.pull = self.term.pull(task.memory.get(self.name, {}), task.broadcast.extras.get(self.name, {}), task.state)

    def reply(self, task: ClientRound, update: ClientUpdate) -> ClientUpdate:
        """Renew the client's memory and send what the server adds up."""
        own, shared = task.memory.get(self.name, {}), task.broadcast.extras.get(self.name, {})
        kept, upload = self.term.finish(own, shared, update.delta, steps=task.steps, lr=task.lr)
        if kept:
            task.kept[self.name] = kept
        return replace(update, extras={**update.extras, self.name: upload}) if upload else update

    def collect(self, memory: Tensors, result: RoundResult) -> Tensors:
        """Return the server's half after the round.

        Raises:
            ClientError: If an update lacks the client's part.
        """
        if not self.term.keeps_shared_memory:
            return {}
        for update in result.updates:
            if self.name not in update.extras:
                raise ClientError(
                    f"client {update.client_id!r} must send extras[{self.name!r}] for regularizer {self.term.name!r}, "
                    f"got {sorted(update.extras)}; let it run the regularizer of the job it was sent"
                )
        return self.term.merge_shared(memory, [update.extras[self.name] for update in result.updates], result.clients)

    def remembers(self, forms: Forms) -> Tensors:
        """Return the forms of the server's half."""
        if not self.term.keeps_shared_memory:
            return {}
        return self.term.merge_shared({}, [forms.up[self.name].tensors], forms.clients)

    def expects(self, up: Mapping[str, Group], model: TrainableModel, client_id: str = "") -> Mapping[str, Group]:
        """Add the client's part, found by finishing a round on the state's forms."""
        forms = {name: torch.empty_like(tensor, device="meta") for name, tensor in up["delta"].tensors.items()}
        _, upload = self.term.finish({}, {}, forms, steps=1, lr=1.0)
        return {**up, self.name: Group(upload)} if upload else up
