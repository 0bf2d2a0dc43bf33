"""What a client keeps between its rounds: files that never cross the wire.

One folder per client, one file per round it took part in, so that a run that goes on from round t finds the memory as
it was after round t, whatever was written later.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fedproxy.federation.round_files import ClientFiles
from fedproxy.protocol import TensorFile, Tensors
from fedproxy.sealed_tensors import facts_of


@dataclass(frozen=True)
class Memory:
    """One client's memory after a round; empty before its first."""

    parts: Mapping[str, Tensors] = field(default_factory=dict)
    """What each round part keeps for this client, by part."""
    num_examples: int = 0
    """The client's training examples, each counted once."""
    num_tokens: int = 0
    """Answer tokens it trained on in its last round."""


class ClientMemory:
    """The memories of the clients that run on one machine.

    Args:
        folder: Folder that holds them; made when something is kept.
    """

    def __init__(self, folder: Path) -> None:
        self.files = ClientFiles(folder)
        """Where the memories lie."""

    def load(self, client_id: str, before: int) -> Memory:
        """Return what a client remembers from its last round before round ``before``.

        Tensors stay in the file until they are used.

        Raises:
            CheckpointError: If the file is damaged.
        """
        files = self.files.of(client_id)
        rounds = [number for number in files.rounds() if number < before]
        if not rounds:
            return Memory()
        path = files.verified(rounds[-1])
        counts: dict[str, int] = json.loads(facts_of(path)["counts"])
        file = TensorFile(path)
        return Memory({part: file.under(f"{part}/") for part in {name.partition("/")[0] for name in file}}, **counts)

    def save(self, client_id: str, round_: int, memory: Memory) -> None:
        """Keep a client's memory after a round; older files that no checkpoint needs are deleted.

        Raises:
            CheckpointError: If it cannot be written.
        """
        tensors = {f"{part}/{name}": t for part, kept in memory.parts.items() for name, t in kept.items()}
        counts = {"num_examples": memory.num_examples, "num_tokens": memory.num_tokens}
        self.files.write(client_id, round_, tensors, {"counts": json.dumps(counts)})

    def drop(self, client_ids: Iterable[str], round_: int) -> None:
        """Undo a round of clients whose update was not used."""
        for client_id in client_ids:
            self.files.of(client_id).remove(round_)

    def rewind(self, round_: int) -> None:
        """Forget everything that was kept after round ``round_``."""
        self.files.rewind(round_)
