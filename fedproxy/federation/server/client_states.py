"""Clients that are never merged (the local-only baseline): each one's state, in files of its own.

One client's state is read when it is served, and written when its update is taken: neither memory nor a checkpoint
holds more of them. Which file is a client's follows from the finished rounds' records, so that a checkpoint and the
files written before it agree whatever was written later.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from fedproxy.federation.round_files import ClientFiles
from fedproxy.federation.server.checkpoint import Progress
from fedproxy.protocol import TensorFile, Tensors


@dataclass(frozen=True)
class ClientState:
    """What one client goes on from."""

    state: Tensors
    """Its trainable state phi_k."""
    server_memory: Tensors = field(default_factory=dict)
    """What the server optimizer remembers for it."""
    aggregator_memory: Tensors = field(default_factory=dict)
    """What the aggregation rule remembers for it."""


_GROUPS = tuple(item.name for item in fields(ClientState))


class ClientStates:
    """The states of all clients of a run.

    Args:
        folder: Folder that holds them; made when something is kept.
    """

    def __init__(self, folder: Path) -> None:
        self.files = ClientFiles(folder)
        """Where the states lie."""

    def save(self, client_id: str, round_: int, after: ClientState) -> None:
        """Keep a client's state after a round; older files that no checkpoint needs are deleted.

        Raises:
            CheckpointError: If it cannot be written.
        """
        groups: dict[str, Tensors] = {group: getattr(after, group) for group in _GROUPS}
        tensors = {f"{group}/{name}": tensor for group, named in groups.items() for name, tensor in named.items()}
        self.files.write(client_id, round_, tensors)

    def after(self, progress: Progress, clients: Sequence[str]) -> "StatesAfter":
        """Return the clients' states as they are after the last round of ``progress``."""
        return StatesAfter(self.files, progress, clients)

    def rewind(self, round_: int) -> None:
        """Forget everything that was kept after round ``round_``."""
        self.files.rewind(round_)


class StatesAfter(Mapping[str, Tensors]):
    """Trainable states by client, at one point of a run; each is read anew when asked for.

    Args:
        files: Where they lie.
        progress: The point; its state is that of clients that were in no round yet.
        clients: All clients, sorted.
    """

    def __init__(self, files: ClientFiles, progress: Progress, clients: Sequence[str]) -> None:
        self._files, self._start, self._clients = files, progress.state, dict.fromkeys(clients)
        self._last = {client: int(line["round"]) for line in progress.records for client in line["clients"]}

    def load(self, client_id: str) -> ClientState:
        """Return what a client goes on from; tensors stay in its file until they are used.

        Raises:
            KeyError: If there is no such client.
            CheckpointError: If the file is missing or damaged.
        """
        if client_id not in self._clients:
            raise KeyError(client_id)
        if client_id not in self._last:
            return ClientState(self._start)
        path = self._files.of(client_id).verified(self._last[client_id])
        return ClientState(**{group: TensorFile(path, f"{group}/") for group in _GROUPS})

    def __getitem__(self, client_id: str) -> Tensors:
        return self.load(client_id).state

    def __contains__(self, client_id: object) -> bool:
        return client_id in self._clients

    def __iter__(self) -> Iterator[str]:
        return iter(self._clients)

    def __len__(self) -> int:
        return len(self._clients)
