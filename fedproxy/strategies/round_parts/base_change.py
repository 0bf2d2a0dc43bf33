"""What a rule moves into every party's frozen weights: FLoRA's stacked factors, FedEx-LoRA's residual."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch

from fedproxy.protocol import Broadcast, TensorFile, Tensors
from fedproxy.round_files import RoundFiles
from fedproxy.strategies.functional.lowrank import A_SUFFIX, B_SUFFIX
from fedproxy.strategies.round_parts.base import ClientRound, Forms, RoundPart, RoundResult
from fedproxy.strategies.trainable.base import TrainableModel


class BaseChanges:
    """The changes that one party has received so far, in files.

    A model that was loaded later (another process, a run that goes on) catches up from them and has the same bits.

    Args:
        folder: Holds them; made when something is received.
    """

    def __init__(self, folder: Path) -> None:
        self.files = RoundFiles(folder)
        """Where they lie."""
        self._received = 0

    def receive(self, model: TrainableModel, round_: int, change: Tensors) -> None:
        """Keep the change of round ``round_``, and bring a model's frozen weights to that round.

        Args:
            model: Its frozen weights may already hold the changes of earlier rounds.
            round_: The round that the change is from.
            change: LoRA factors whose product times s is added.

        Raises:
            CheckpointError: If the model lacks the change of an earlier round, and its file is missing or damaged.
        """
        if round_ != self._received:
            self.files.keep(round_, change)
            self._received = round_
        for number in range(model.frozen_round + 1, round_ + 1):
            model.add_to_frozen(TensorFile(self.files.verified(number)))
            model.frozen_round = number


@dataclass(frozen=True)
class BaseChange(RoundPart, name="base_change"):
    """Sends the previous round's change as LoRA factors; every client adds it once, in the order of rounds."""

    order: ClassVar[int] = 50
    server_copies: ClassVar[int] = 2
    to_all: ClassVar[bool] = True

    def send(self, broadcast: Broadcast, memory: Tensors) -> Broadcast:
        """Add the change of the round before."""
        return broadcast if broadcast.round == 1 else replace(broadcast, extras={**broadcast.extras, self.name: memory})

    def receive(self, task: ClientRound) -> None:
        """Keep the change, and bring the model's frozen weights to the round before."""
        if self.name in task.broadcast.extras:
            task.base.receive(task.model, task.broadcast.round - 1, task.broadcast.extras[self.name])

    def collect(self, memory: Tensors, result: RoundResult) -> Tensors:
        """Keep the round's change."""
        return result.aggregation.base_change

    def remembers(self, forms: Forms) -> Tensors:
        """Return float32 factors of the rank that a round moves."""
        found = {}
        for name, factor in forms.rules.model.parameters().items():
            if name.endswith((A_SUFFIX, B_SUFFIX)):
                rank, width = factor.shape if name.endswith(A_SUFFIX) else reversed(factor.shape)
                moved = forms.rules.aggregator.base_rank(forms.drawn, int(rank))
                found[name] = torch.empty(moved, int(width), device="meta")
        return found
