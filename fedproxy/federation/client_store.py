"""What is kept on disk for single clients beside their rows, in one folder, and the changes of the frozen weights."""

from pathlib import Path

from fedproxy.federation.client_memory import ClientMemory
from fedproxy.federation.client_states import ClientStates
from fedproxy.federation.frozen_weights import FrozenChanges


class ClientStore:
    """The clients' side of a run folder, shared by the processes that run them.

    Args:
        folder: ``runs/<name>/checkpoints``, beside the server's own checkpoints; nothing is made until it is needed.
    """

    def __init__(self, folder: Path) -> None:
        self.memory = ClientMemory(folder / "clients")
        self.states = ClientStates(folder / "states")
        self.frozen = FrozenChanges(folder / "frozen_changes")

    def rewind(self, round_: int) -> None:
        """Bring the store to where it was after round ``round_``, before a run goes on from there."""
        self.memory.rewind(round_)
        self.states.rewind(round_)
        self.frozen.rewind(round_)
