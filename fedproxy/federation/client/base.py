"""What an engine needs to know of a client: what it is asked, how another process makes it, what its failure says."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol

from fedproxy.errors import CheckpointError, one_line
from fedproxy.federation.client.log import told
from fedproxy.messages import Answer, Dropped, Message
from fedproxy.protocol import Broadcast, ClientUpdate


class Client(Protocol):
    """What serves one client after another on one resident base model."""

    def train(self, broadcast: Broadcast, client_id: str, *, deadline: float | None = None) -> ClientUpdate:
        """Train client ``client_id`` from the broadcast state and return its update.

        Args:
            broadcast: The round's broadcast, addressed to this client.
            client_id: Whose rows to train on.
            deadline: ``time.monotonic()`` after which to give up; passed only where a round has a timeout.
        """
        ...

    def answer(self, message: Message, client_id: str) -> Answer:
        """Do what a message asks of client ``client_id``."""
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
    """Accelerators that clients may train on, by index, or groups of them; empty for the CPU."""
    logs: str | None = None
    """Folder of the clients' own logs, on their side; None keeps none."""
    ranks: int = 1
    """Processes that serve a client together; where there are several, each is told its ``rank`` and ``rendezvous``, a
    file by which they find each other."""


class Attempt(AbstractContextManager["Attempt"]):
    """One client's work; whatever goes wrong within this context becomes the reason why the client is dropped.

    A file of the run that is damaged or cannot be written (``CheckpointError``) is no client's fault and passes.

    Args:
        client_id: Whose work.
        round_: The round, for its log.
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


_LISTENER: ContextVar[Callable[[float], None] | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: Callable[[float], None]) -> Iterator[None]:
    """Let whoever runs a client know what share of each fit is done, in [0, 1], for the length of the context."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


def listener() -> Callable[[float], None] | None:
    """Return who listens to this client's fits, or None."""
    return _LISTENER.get()
