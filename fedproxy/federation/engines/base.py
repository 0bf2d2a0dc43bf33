"""The family of engines."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from fedproxy.protocol import Broadcast, ClientUpdate
from fedproxy.registry import Component


class Client(Protocol):
    """What trains one client after another on one resident base model."""

    def train(self, broadcast: Broadcast, client_id: str) -> ClientUpdate:
        """Train client ``client_id`` from the broadcast state and return its update."""
        ...


class RunningEngine(Protocol):
    """An engine with its clients loaded."""

    def run(self, broadcast: Broadcast, client_ids: Sequence[str]) -> Iterator[ClientUpdate]:
        """Run the clients of one round; updates come in the order in which clients finish."""
        ...

    def close(self) -> None:
        """Free what the engine holds."""
        ...


@dataclass(frozen=True)
class Engine(Component, family="engine"):
    """Runs a round's clients."""

    @abstractmethod
    def start(self, make_client: Callable[[], Client]) -> RunningEngine:
        """Load clients once (one :class:`Client` per process or device) and return the engine that runs them."""
