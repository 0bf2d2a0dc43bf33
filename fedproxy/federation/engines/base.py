"""The family of engines: what runs a round's clients, and what it says of those that did not deliver."""

from abc import abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

from fedproxy.errors import CheckpointError, one_line
from fedproxy.federation.client.log import told
from fedproxy.protocol import Broadcast, ClientUpdate
from fedproxy.registry import Component


@dataclass(frozen=True)
class UpdateFile:
    """An update as it came: a file that nobody has looked into; :mod:`fedproxy.federation.server.admission` does."""

    client_id: str
    """Who was asked for it."""
    path: Path


class Client(Protocol):
    """What trains one client after another on one resident base model."""

    def train(
        self, broadcast: Broadcast, client_id: str, *, deadline: float | None = None
    ) -> ClientUpdate | UpdateFile:
        """Train client ``client_id`` from the broadcast state and return its update.

        Args:
            broadcast: The round's broadcast, addressed to this client.
            client_id: Whose rows to train on.
            deadline: ``time.monotonic()`` after which to give up; passed only where a round has a timeout.
        """
        ...


@runtime_checkable
class Closing(Protocol):
    """A client that holds more than memory, such as processes of its own."""

    def close(self) -> None:
        """Let go of it; the client may train again and then starts afresh."""
        ...


@dataclass(frozen=True)
class Dropped:
    """A client that takes no part in the round's result, and why."""

    client_id: str
    reason: str
    """One line."""


Answer = ClientUpdate | UpdateFile | Dropped
Answers = Generator[Answer, None, None]
"""What an engine gives for a round; closing it stops the clients that still run."""


class RunningEngine(Protocol):
    """An engine with its clients loaded."""

    def run(self, broadcast: Broadcast, client_ids: Sequence[str], *, timeout_s: float | None = None) -> Answers:
        """Run the clients of one round; answers come in the order in which clients finish, one for each client.

        Files of updates stay until the next round begins or the engine is closed.

        Args:
            broadcast: What every client starts from; each is sent what ``broadcast.addressed_to`` gives for it.
            client_ids: The round's clients.
            timeout_s: Seconds after which clients that have not finished are dropped; None waits for all.
        """
        ...

    def close(self) -> None:
        """Free what the engine holds."""
        ...


@dataclass(frozen=True)
class RemoteClient:
    """How another process makes a :class:`Client`: plain values alone, and nothing of the target."""

    factory: str
    """``package.module:name`` of what is called with ``options`` and ``device`` and returns the client."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments that JSON can carry."""
    plugins: Sequence[str] = ()
    """Modules to import first."""
    devices: Sequence[int] = ()
    """Accelerators that clients may train on, by index; empty for the CPU."""
    logs: str | None = None
    """Folder of the clients' own logs, on their side; None keeps none."""


@dataclass(frozen=True)
class Engine(Component, family="engine"):
    """Runs a round's clients."""

    @abstractmethod
    def start(self, make_client: Callable[[], Client], remote: RemoteClient, folder: Path) -> RunningEngine:
        """Make ready to run clients.

        Args:
            make_client: Makes the client of this process.
            remote: How to make the same client in another process.
            folder: Scratch folder of the run; it need not exist.
        """


class Attempt(AbstractContextManager["Attempt"]):
    """One client's training; whatever goes wrong within this context becomes the reason why the client is dropped.

    A file of the run that is damaged or cannot be written (``CheckpointError``) is no client's fault and passes.

    Args:
        client_id: Who trains.
        round_: In which round.
        logs: Folder of clients' own logs, where errors are kept whole; None keeps none.
    """

    def __init__(self, client_id: str, round_: int, logs: str | None) -> None:
        self._client_id, self._round, self._logs = client_id, round_, logs
        self.answer: Answer = Dropped(client_id, "it gave no answer")

    def answered(self, answer: Answer) -> None:
        """Take the client's answer, which must be in its own name."""
        if answer.client_id != self._client_id:
            other = one_line(repr(answer.client_id), 100)
            answer = Dropped(self._client_id, f"its update is in the name of client {other}")
        self.answer = answer

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """Keep an error in the client's log."""
        if not isinstance(error, Exception) or isinstance(error, CheckpointError):
            return False
        self.answer = Dropped(self._client_id, told(error, self._client_id, self._round, self._logs))
        return True


def late(timeout_s: float) -> str:
    """Return why a client that did not finish in time is dropped."""
    return f"late: no update within federation.round_timeout_s of {timeout_s:g} s"
