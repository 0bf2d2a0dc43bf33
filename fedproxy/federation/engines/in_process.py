"""Clients one after another in this process."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from fedproxy.federation.client.base import Attempt, Client, RemoteClient, listening
from fedproxy.federation.engines.base import Engine, late
from fedproxy.federation.engines.pool import WorkerPool
from fedproxy.machine import MOST_THREADS
from fedproxy.messages import Answers, Dropped, Message, Sites, Working, nobody
from fedproxy.protocol import Broadcast

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class InProcess(Engine, name="in_process"):
    """One resident base model; clients' states are swapped in and out of it.

    A client of several devices has processes of its own, as with ``workers``, one client at a time.

    A round's timeout is looked at after each batch of a client's training: what hangs within one batch is not stopped,
    which a run says when it starts.
    """

    threads: int | None = None
    """CPU threads inside a client's operations; null is PyTorch's own number. Rounding depends on it, so bits agree
    between engines where it is the same (``workers`` takes 1)."""

    def __post_init__(self) -> None:
        """Check the options."""
        ok = self.threads is None or 1 <= self.threads <= MOST_THREADS
        self.require("threads", ok, f"from 1 to {MOST_THREADS}, or null")

    def start(self, make_client: Callable[[], Client], remote: RemoteClient, folder: Path) -> Sites:
        """Load the one client there is."""
        if remote.ranks > 1:
            threads = max(1, (self.threads or torch.get_num_threads()) // remote.ranks)
            return WorkerPool(remote, folder, size=1, threads=threads)
        return _Running(make_client(), self.threads, remote.logs)


@dataclass
class _Running:
    client: Client
    threads: int | None
    logs: str | None
    _warned: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.working: Working = nobody

    def run(self, broadcast: Broadcast, client_ids: Sequence[str], *, timeout_s: float | None = None) -> Answers:
        if timeout_s is not None:
            self._warn_once()
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        limits = {} if deadline is None else {"deadline": deadline}
        for client_id in client_ids:
            tried, sent = Attempt(client_id, broadcast.round, self.logs), broadcast.addressed_to(client_id)
            if deadline is None or time.monotonic() < deadline:
                tell = partial(self.working, broadcast.round, client_id)
                with cpu_threads(self.threads), listening(tell), tried:
                    tried.answered(self.client.train(sent, client_id, **limits))
            in_time = deadline is None or timeout_s is None or time.monotonic() < deadline
            yield tried.answer if in_time else Dropped(client_id, late(timeout_s or 0.0))

    def _warn_once(self) -> None:
        if not self._warned:
            _log.warning(
                "federation.round_timeout_s: engine.name=in_process looks at the time after each batch only, so a "
                "client that hangs within one holds up the run; engine.name=workers stops it"
            )
        self._warned = True

    def ask(self, messages: Mapping[str, Message]) -> Answers:
        for client_id, message in messages.items():
            tried = Attempt(client_id, 0, self.logs)
            with cpu_threads(self.threads), tried:
                tried.answered(self.client.answer(message, client_id))
            yield tried.answer

    def close(self) -> None:
        pass


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Let PyTorch's operations use ``count`` threads for the length of the context; None changes nothing.

    Sums are split differently for each number, so that it is part of the bits.
    """
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count is not None:
            torch.set_num_threads(before)
