"""What is kept on disk for single clients beside their rows, in one folder, and the changes of the frozen weights."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from fedproxy.errors import CheckpointError
from fedproxy.federation.client.frozen_weights import FrozenChanges
from fedproxy.federation.client.memory import ClientMemory
from fedproxy.federation.round_files import RoundFiles
from fedproxy.federation.server.client_states import ClientStates
from fedproxy.sealed_tensors import facts_of

Kept = Mapping[str, Mapping[str, str]]
"""Owner's key (kind and name) to round to hash of the file's content."""


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

    def kept(self, before: Kept, round_: int, clients: Iterable[str]) -> dict[str, dict[str, str]]:
        """Return the files that nobody can do without who goes on after a round, with their hashes, for its checkpoint.

        Only what the files say of themselves is read.

        Args:
            before: The same after the round before.
            round_: The round.
            clients: Whose updates were used.
        """
        found = {key: dict(files) for key, files in before.items()}
        for client in clients:
            for kind in ("memory", "states"):
                if seal := facts_of(self._files(f"{kind}/{client}").path(round_)).get("sha256"):
                    found[f"{kind}/{client}"] = {str(round_): seal}
        changes = found.get("frozen", {})
        for number in self.frozen.files.rounds():
            if str(number) not in changes and (seal := facts_of(self.frozen.files.path(number)).get("sha256")):
                changes[str(number)] = seal
        return found | ({"frozen": changes} if changes else {})

    def check(self, kept: Kept) -> None:
        """Read through the files that a checkpoint names.

        Raises:
            CheckpointError: If one is missing, damaged, or another than the one that was there when it was written.
        """
        for key, files in kept.items():
            for number, seal in files.items():
                self._files(key).verified(int(number), seal)

    def _files(self, key: str) -> RoundFiles:
        kind, _, client = key.partition("/")
        if kind not in ("memory", "states", "frozen"):
            raise CheckpointError(f"the checkpoint names {key!r}, which is nothing that is kept")
        if kind == "frozen":
            return self.frozen.files
        return (self.memory if kind == "memory" else self.states).files.of(client)
