"""What a client keeps between its rounds: files that never cross the wire.

One folder per client, one file per round it took part in, so that a run that goes on from round t finds the memory as
it was after round t, whatever was written later.
"""

from collections.abc import Mapping
from pathlib import Path

from fedproxy.errors import CheckpointError
from fedproxy.messages import Rewind
from fedproxy.protocol import Kept, TensorFile, Tensors
from fedproxy.round_files import ClientFiles
from fedproxy.sealed import RESTART
from fedproxy.strategies.round_parts.base_change import BaseChanges


class ClientMemory:
    """The memories of the clients of one site, and the changes of the frozen weights that it received.

    Args:
        folder: Folder of the site's own; nothing is made until it is needed.
    """

    def __init__(self, folder: Path) -> None:
        self.files = ClientFiles(folder / "clients")
        """Where the memories lie."""
        self.changes = BaseChanges(folder / "frozen_changes")
        """What all clients of the site received."""

    def load(self, client_id: str, kept: Kept) -> dict[str, Tensors]:
        """Return what a client kept after the last round of its that counts, by round part; nothing before its first.

        Tensors stay in the file until they are used.

        Raises:
            CheckpointError: If the file is missing, damaged, or another than the server knows of.
        """
        if not kept.round:
            return {}
        file = TensorFile(self.files.of(client_id).verified(kept.round, kept.seal))
        return {part: file.under(f"{part}/") for part in {name.partition("/")[0] for name in file}}

    def save(self, client_id: str, round_: int, parts: Mapping[str, Tensors]) -> str:
        """Keep a client's memory after a round, delete older files that no checkpoint needs, and return its hash.

        Raises:
            CheckpointError: If it cannot be written.
        """
        tensors = {f"{part}/{name}": tensor for part, kept in parts.items() for name, tensor in kept.items()}
        return self.files.write(client_id, round_, tensors)

    def forget_after(self, client_id: str, round_: int) -> None:
        """Delete what a client kept in later rounds, which did not count."""
        self.files.of(client_id).rewind(round_)

    def rewind(self, client_id: str, message: Rewind) -> None:
        """Go back to where the client and its site were after a round.

        Raises:
            CheckpointError: If what was kept then is missing, damaged, or another than the server knows of.
        """
        self.forget_after(client_id, message.kept.round)
        self.load(client_id, message.kept)
        if message.changes:
            self.changes.files.rewind(message.round - 1)  # that of the last round comes with the next one
            if self.changes.files.seal(message.round - 1) != message.changes:
                raise CheckpointError(
                    f"the changes of the frozen weights in {self.changes.files.folder} cannot be used: they are not "
                    f"those that the checkpoint was written with; {RESTART}"
                )
