"""The family of engines: what runs a round's clients, and what it says of those that did not deliver."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedproxy.federation.client.base import Client, RemoteClient
from fedproxy.messages import Sites
from fedproxy.registry import Component


@dataclass(frozen=True)
class Engine(Component, family="engine"):
    """Runs a round's clients."""

    @abstractmethod
    def start(self, make_client: Callable[[], Client], remote: RemoteClient, folder: Path) -> Sites:
        """Make ready to run clients.

        Args:
            make_client: Makes the client of this process.
            remote: How to make the same client in another process.
            folder: Scratch folder of the run; it need not exist.
        """


def late(timeout_s: float) -> str:
    """Return why a client that did not finish in time is dropped."""
    return f"late: no update within federation.round_timeout_s of {timeout_s:g} s"
