"""What a client keeps between its rounds: files that never cross the wire.

One folder per client, one file per round it took part in, so that a run that goes on from round t finds the memory as
it was after round t, whatever was written later.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open

from fedproxy.errors import CheckpointError
from fedproxy.federation.round_files import ClientFiles
from fedproxy.protocol import TensorFile, Tensors


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
        self._files = ClientFiles(folder)

    def load(self, client_id: str, before: int) -> Memory:
        """Return what a client remembers from its last round before round ``before``.

        Tensors stay in the file until they are used.

        Raises:
            CheckpointError: If the file is damaged.
        """
        files = self._files.of(client_id)
        rounds = [number for number in files.rounds() if number < before]
        if not rounds:
            return Memory()
        path = files.path(rounds[-1])
        try:
            with safe_open(path, framework="pt") as file:
                counts: dict[str, int] = json.loads((file.metadata() or {})["counts"])
                parts = sorted({name.partition("/")[0] for name in file.keys()})  # noqa: SIM118
            return Memory({part: TensorFile(path, f"{part}/") for part in parts}, **counts)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise CheckpointError(
                f"the memory of client {client_id!r} in {path} is damaged ({error}); start again with overwrite=true"
            ) from error

    def save(self, client_id: str, round_: int, memory: Memory) -> None:
        """Keep a client's memory after a round; older files that no checkpoint needs are deleted.

        Raises:
            CheckpointError: If it cannot be written.
        """
        tensors = {f"{part}/{name}": t for part, kept in memory.parts.items() for name, t in kept.items()}
        counts = {"num_examples": memory.num_examples, "num_tokens": memory.num_tokens}
        self._files.write(client_id, round_, tensors, {"counts": json.dumps(counts)})

    def drop(self, client_ids: Iterable[str], round_: int) -> None:
        """Undo a round of clients whose update was not used."""
        for client_id in client_ids:
            self._files.of(client_id).remove(round_)

    def rewind(self, round_: int) -> None:
        """Forget everything that was kept after round ``round_``."""
        self._files.rewind(round_)
