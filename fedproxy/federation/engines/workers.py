"""Clients side by side in processes of their own, one for each device or several on the CPU."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedproxy.federation.client.base import Client, RemoteClient
from fedproxy.federation.engines.base import Engine
from fedproxy.federation.engines.pool import Limits, WorkerPool
from fedproxy.machine import MOST_THREADS, cores


@dataclass(frozen=True)
class Workers(Engine, name="workers"):
    """Clients side by side: each process holds one proxy and takes the next client when it is free.

    Results depend neither on the number of workers nor on the order in which clients finish. The round's state is
    written once as a safetensors file that all workers read (once for each client where clients have states of their
    own), updates come back as files that are merged one tensor at a time. A worker that dies or hangs is replaced and
    its client tried once more; if it cannot be replaced, the run continues with one fewer as long as one is left. A
    round's timeout counts from when its first client is handed out.
    """

    workers: int | str = "auto"
    """Processes: a number, or ``auto`` for one per accelerator, on the CPU one per ``threads`` cores."""
    threads: int = 1
    """CPU threads inside a worker's operations. Rounding depends on it, so keep it where runs are to agree bit for bit
    (with ``in_process`` too, which has the same option)."""
    client_timeout_s: float | None = None
    """Seconds after which a client's worker counts as hung; null waits until the round ends."""
    start_timeout_s: float = 600.0
    """Seconds that a worker has to start and load the proxy, after which it counts as hung and is replaced."""

    def __post_init__(self) -> None:
        """Check the options."""
        count = self.workers
        self.require("workers", count == "auto" or (isinstance(count, int) and count >= 1), "'auto' or at least 1")
        self.require("threads", 1 <= self.threads <= MOST_THREADS, f"from 1 to {MOST_THREADS}")
        limit = self.client_timeout_s
        self.require("client_timeout_s", limit is None or limit > 0, "positive, or null")
        self.require("start_timeout_s", self.start_timeout_s > 0, "positive")

    def start(self, make_client: Callable[[], Client], remote: RemoteClient, folder: Path) -> WorkerPool:
        """Make ready; processes start when the first round needs them."""
        limits = Limits(self.client_timeout_s, self.start_timeout_s)
        return WorkerPool(
            remote, folder, size=self.count(remote), threads=max(1, self.threads // remote.ranks), limits=limits
        )

    def count(self, remote: RemoteClient) -> int:
        """Return how many clients are served at once at most."""
        if self.workers != "auto":
            return int(self.workers)
        return len(remote.devices) or max(1, cores() // (self.threads * remote.ranks))
