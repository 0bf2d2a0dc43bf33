"""The family of engines: what runs a round's clients, and what it says of those that did not deliver."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from fedproxy.data.partition.rows import ClientRows
from fedproxy.federation.client.base import Client, RemoteClient
from fedproxy.messages import Sites
from fedproxy.registry import Component


@dataclass(frozen=True)
class Engine(Component, family="engine"):
    """Runs a round's clients."""

    at_sites: ClassVar[bool] = False
    """Whether clients are real sites with rows of their own, so that the server deals none out."""

    def clients(self) -> ClientRows:
        """Return clients at real sites with their numbers of rows.

        Raises:
            ClientError: If a site does not answer.
        """
        raise NotImplementedError

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
