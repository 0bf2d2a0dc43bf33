"""Clients one after another in this process."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedproxy.federation.engines.base import (
    Answers,
    Attempt,
    Client,
    Closing,
    Dropped,
    Engine,
    RemoteClient,
    late,
)
from fedproxy.federation.engines.threads import cpu_threads
from fedproxy.protocol import Broadcast

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class InProcess(Engine, name="in_process"):
    """One resident base model; clients' states are swapped in and out of it.

    A round's timeout is looked at after each batch of a client's training: what hangs within one batch is not stopped,
    which a run says when it starts.
    """

    threads: int | None = None
    """CPU threads inside a client's operations; null is PyTorch's own number. Rounding depends on it, so bits agree
    between engines where it is the same (``workers`` takes 1)."""

    def __post_init__(self) -> None:
        self.require("threads", self.threads is None or self.threads >= 1, "at least 1, or null")

    def start(self, make_client: Callable[[], Client], remote: RemoteClient, folder: Path) -> "_Running":
        """Load the one client there is."""
        return _Running(make_client(), self.threads, remote.logs)


@dataclass
class _Running:
    client: Client
    threads: int | None
    logs: str | None
    _warned: bool = field(default=False, init=False)

    def run(self, broadcast: Broadcast, client_ids: Sequence[str], *, timeout_s: float | None = None) -> Answers:
        if timeout_s is not None:
            self._warn_once()
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        limits = {} if deadline is None else {"deadline": deadline}
        for client_id in client_ids:
            tried, sent = Attempt(client_id, broadcast.round, self.logs), broadcast.addressed_to(client_id)
            if deadline is None or time.monotonic() < deadline:
                with cpu_threads(self.threads), tried:
                    tried.answered(self.client.train(sent, client_id, **limits))
            in_time = deadline is None or timeout_s is None or time.monotonic() < deadline
            yield tried.answer if in_time else Dropped(client_id, late(timeout_s or 0.0))

    def _warn_once(self) -> None:
        if not self._warned and not isinstance(self.client, Closing):  # processes of its own end with the time
            _log.warning(
                "federation.round_timeout_s: engine.name=in_process looks at the time after each batch only, so a "
                "client that hangs within one holds up the run; engine.name=workers stops it"
            )
        self._warned = True

    def close(self) -> None:
        if isinstance(self.client, Closing):
            self.client.close()
