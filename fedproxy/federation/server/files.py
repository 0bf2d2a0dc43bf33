"""Files of the server's own beside its checkpoints: states of clients that are never merged, changes of frozen weights.

Where clients are never merged (the local-only baseline), one client's state is read when it is served, and written
when its update is taken: neither memory nor a checkpoint holds more of them. Which file is a client's follows from the
finished rounds' records, so that a checkpoint and the files written before it agree whatever was written later.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from fedproxy.errors import CheckpointError
from fedproxy.federation.server.checkpoint import Progress
from fedproxy.protocol import TensorFile, Tensors
from fedproxy.round_files import ClientFiles, RoundFiles
from fedproxy.sealed_tensors import facts_of
from fedproxy.strategies.round_parts.base_change import BaseChanges


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
        """Read a client's trainable state."""
        return self.load(client_id).state

    def __contains__(self, client_id: object) -> bool:
        """Return whether this client has a state, without reading it."""
        return client_id in self._clients

    def __iter__(self) -> Iterator[str]:
        """Yield the clients' names."""
        return iter(self._clients)

    def __len__(self) -> int:
        """Return the number of clients."""
        return len(self._clients)


class ServerFiles:
    """What the server keeps in files of rounds, beside its checkpoints: nothing of it is a client's.

    Args:
        folder: ``runs/<name>/checkpoints``; nothing is made until it is needed.
    """

    def __init__(self, folder: Path) -> None:
        self.states = ClientStates(folder / "states")
        """A state for each client, where clients are never merged."""
        self.changes = BaseChanges(folder / "base_changes")
        """What rules moved into the frozen weights."""

    def rewind(self, round_: int) -> None:
        """Bring them to where they were after round ``round_``, before a run goes on from there."""
        self.states.rewind(round_)
        self.changes.files.rewind(round_)

    def kept(self, before: Progress, round_: int, clients: Iterable[str]) -> dict[str, dict[str, str]]:
        """Return the files that nobody can do without who goes on after a round, with their hashes, for its checkpoint.

        Only what the files say of themselves is read.

        Args:
            before: The progress after the round before.
            round_: The round.
            clients: Whose updates were used.
        """
        found = {key: dict(files) for key, files in before.files.items()}
        for client in clients:
            if seal := facts_of(self.states.files.of(client).path(round_)).get("sha256"):
                found[f"states/{client}"] = {str(round_): seal}
        if seal := facts_of(self.changes.files.path(round_)).get("sha256"):
            found["changes"] = {**found.get("changes", {}), str(round_): seal}
        return found

    def check(self, kept: Mapping[str, Mapping[str, str]]) -> None:
        """Read through the files that a checkpoint names.

        Raises:
            CheckpointError: If one is missing, damaged, or another than the one that was there when it was written.
        """
        for key, files in kept.items():
            for number, seal in files.items():
                self._files(key).verified(int(number), seal)

    def _files(self, key: str) -> RoundFiles:
        kind, _, client = key.partition("/")
        if kind == "states":
            return self.states.files.of(client)
        if kind == "changes":
            return self.changes.files
        raise CheckpointError(f"the checkpoint names {key!r}, which is nothing that is kept")
