"""Rules that move the frozen weights: every party applies every round's change once, in the order of rounds.

A broadcast carries the change of the round before, as LoRA factors. Whoever receives it keeps it in a file, so that a
model that was loaded later (another process, a run that goes on) catches up from the files and has the same bits.
"""

from pathlib import Path

from fedproxy.errors import CheckpointError
from fedproxy.federation.round_files import RoundFiles
from fedproxy.protocol import TensorFile, Tensors
from fedproxy.strategies.trainable.base import TrainableModel


class FrozenChanges:
    """The changes received so far, in files.

    Args:
        folder: Folder that holds them; made when something is received.
    """

    def __init__(self, folder: Path) -> None:
        self.files = RoundFiles(folder)
        """Where they lie."""

    def receive(self, model: TrainableModel, round_: int, change: Tensors) -> None:
        """Keep the change of round ``round_``, and bring a model's frozen weights to that round.

        Args:
            model: Its frozen weights may already hold the changes of earlier rounds.
            round_: The round that the change is from.
            change: LoRA factors whose product times s is added.

        Raises:
            CheckpointError: If the model lacks the change of an earlier round, and its file is missing or damaged.
        """
        try:
            self.files.verified(round_)
        except CheckpointError:  # not received before, or damaged since
            self.files.write(round_, change, {})
        for number in range(model.frozen_round + 1, round_ + 1):
            model.add_to_frozen(TensorFile(self.files.verified(number)))
            model.frozen_round = number

    def rewind(self, round_: int) -> None:
        """Forget the changes of all rounds after ``round_``."""
        self.files.rewind(round_)
