"""Clients one after another in this process."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fedproxy.errors import ClientError, FedProxyError
from fedproxy.federation.engines.base import Client, Engine
from fedproxy.protocol import Broadcast, ClientUpdate


@dataclass(frozen=True)
class InProcess(Engine, name="in_process"):
    """One resident base model; clients' states are swapped in and out of it."""

    def start(self, make_client: Callable[[], Client]) -> "_Running":
        """Load the one client there is."""
        return _Running(make_client())


@dataclass
class _Running:
    client: Client

    def run(self, broadcast: Broadcast, client_ids: Sequence[str]) -> Iterator[ClientUpdate]:
        for client_id in client_ids:
            try:
                yield self.client.train(broadcast, client_id)
            except FedProxyError as error:
                raise ClientError(f"client {client_id!r} failed in round {broadcast.round}: {error}") from error
            except (RuntimeError, ValueError, MemoryError) as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                raise ClientError(
                    f"client {client_id!r} failed in round {broadcast.round}: {type(error).__name__}: {reason}"
                ) from error

    def close(self) -> None:
        pass
