"""What an engine needs to know of a client: what it is asked, how another process makes it, what its failure says."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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


def attempt(work: Callable[[], Answer], client_id: str, round_: int, *, logs: str | None) -> Answer:
    """Do one client's work; whatever goes wrong in it becomes the reason why it is dropped.

    Args:
        work: Trains the client, or lets it answer.
        client_id: Its name.
        round_: The round, for its log.
        logs: Folder of clients' own logs, where errors are kept whole; None keeps none.

    Raises:
        CheckpointError: If a file of the run is damaged or cannot be written, which is no client's fault.
    """
    try:
        answer = work()
    except CheckpointError:
        raise
    except Exception as error:
        return Dropped(client_id, told(error, client_id, round_, logs))
    if answer.client_id == client_id:
        return answer
    return Dropped(client_id, f"its update is in the name of client {one_line(repr(answer.client_id), 100)}")
