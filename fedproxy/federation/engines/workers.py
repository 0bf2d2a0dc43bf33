"""Clients side by side in processes of their own, one for each device or several on the CPU."""

import logging
import os
import selectors
import shutil
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fedproxy.errors import CheckpointError, ClientError
from fedproxy.federation.client.base import Client, RemoteClient
from fedproxy.federation.engines.base import Engine, late
from fedproxy.federation.engines.worker_process import LONGEST_WAIT_S, BadMessageError, Message, WorkerProcess
from fedproxy.files import private_folder, write_json
from fedproxy.protocol import Answer, Answers, Broadcast, Done, Dropped, UpdateFile
from fedproxy.protocol import Message as Question

_log = logging.getLogger(__name__)
_BROADCAST = "broadcast.safetensors"
_TRIES = 2
"""How often a client is tried whose worker dies or hangs, and how often in a row a worker may fail to start."""


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
        count = self.workers
        self.require("workers", count == "auto" or (isinstance(count, int) and count >= 1), "'auto' or at least 1")
        self.require("threads", self.threads >= 1, "at least 1")
        limit = self.client_timeout_s
        self.require("client_timeout_s", limit is None or limit > 0, "positive, or null")
        self.require("start_timeout_s", self.start_timeout_s > 0, "positive")

    def start(self, make_client: Callable[[], Client], remote: RemoteClient, folder: Path) -> "WorkerPool":
        """Make ready; processes start when the first round needs them."""
        return WorkerPool(self, remote, folder)

    def count(self, devices: Sequence[int]) -> int:
        """Return how many processes there will be at most."""
        if self.workers != "auto":
            return int(self.workers)
        return len(devices) or max(1, _cores() // self.threads)


@dataclass
class _Task:
    """One client that still has to answer."""

    number: int
    client_id: str
    update: Path
    question: Question | None = None
    """What it is asked; None is to train."""
    tries: int = 0
    spared: bool = False
    """Whether a worker died before it took the client up, which costs no try, but only once."""


@dataclass
class _Slot:
    """A worker and what it is doing."""

    process: WorkerProcess
    task: _Task | None = None
    ready: bool = False
    begun: bool = False
    """Whether it has taken its task up."""
    since: float = field(default_factory=time.monotonic)
    """When it was started, or given its last task."""


class WorkerPool:
    """Running workers of one federation.

    Args:
        options: The engine.
        remote: How a worker makes its client.
        folder: Where messages' files lie; emptied now and removed at the end.

    Raises:
        CheckpointError: If the folder cannot be written.
    """

    def __init__(self, options: Workers, remote: RemoteClient, folder: Path) -> None:
        self.options, self.devices, self.size = options, remote.devices, options.count(remote.devices)
        self._base, self._slots, self._started, self._lost_starts = folder, list[_Slot](), 0, 0
        self._any_ready, self._lost_on = False, Counter[int | None]()
        try:
            shutil.rmtree(folder, ignore_errors=True)
            self.folder = Path(tempfile.mkdtemp(dir=private_folder(folder))).absolute()
            self._logs = self.folder if remote.logs is None else Path(remote.logs)
            write_json(self.folder / "setup.json", asdict(remote))
        except OSError as error:
            raise CheckpointError(f"{folder} cannot be written ({error}); free disk space, then resume=auto") from error

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that run."""
        return [slot.process.pid for slot in self._slots]

    def run(self, broadcast: Broadcast, client_ids: Sequence[str], *, timeout_s: float | None = None) -> Answers:
        """Run one round's clients; see :class:`fedproxy.protocol.Sites`.

        Raises:
            ClientError: If workers cannot start and none is left.
            CheckpointError: If the broadcast cannot be written.
        """
        return self._serve(broadcast, dict.fromkeys(client_ids), timeout_s)

    def ask(self, messages: Mapping[str, Question]) -> Answers:
        """Send each client its message; see :class:`fedproxy.protocol.Sites`.

        Raises:
            ClientError: If workers cannot start and none is left.
            CheckpointError: If what a client kept cannot be used.
        """
        return self._serve(Broadcast(0, {}), messages, None)

    def _serve(self, broadcast: Broadcast, asked: Mapping[str, Question | None], timeout_s: float | None) -> Answers:
        deadline: float | None = None
        folder = self._begin(broadcast)
        todo = deque(
            _Task(number, client_id, folder / f"update_{number:05d}.safetensors", asked[client_id])
            for number, client_id in enumerate(asked)
        )
        try:
            while todo or self._busy():
                if deadline is not None and timeout_s is not None and time.monotonic() >= deadline:
                    left = [slot.task for slot in self._busy() if slot.task is not None] + list(todo)
                    yield from (Dropped(task.client_id, late(timeout_s)) for task in left)
                    self._stop_slow_starts(timeout_s)
                    return
                self._hand_out(todo, broadcast, folder)
                if deadline is None and timeout_s is not None and self._busy():
                    deadline = time.monotonic() + timeout_s  # what workers need to start is not the clients' time
                for slot in self._wait(deadline):
                    yield from self._hear(slot, todo)
                yield from self._stop_hung(todo)
        finally:
            for slot in self._busy():
                self._remove(slot)

    def close(self) -> None:
        """End all workers and remove their files."""
        for slot in list(self._slots):
            self._remove(slot)
        shutil.rmtree(self._base, ignore_errors=True)

    def _begin(self, broadcast: Broadcast) -> Path:
        """Return a new folder for what a round's files hold, with the broadcast in it where all clients get the same.

        No two runs share a folder, whatever their rounds: workers know what they have read by its path.
        """
        try:
            for old in self.folder.glob("round_*"):
                shutil.rmtree(old, ignore_errors=True)  # workers write there
            folder = Path(tempfile.mkdtemp(prefix=f"round_{broadcast.round:04d}_", dir=self.folder))
            if broadcast.each is None and broadcast.round:
                broadcast.save(folder / _BROADCAST)
        except (OSError, SafetensorError) as error:
            raise _unwritten(broadcast, self.folder, error) from error
        return folder

    def _sent(self, task: _Task, broadcast: Broadcast, folder: Path) -> Path:
        """Return the file of what a client is sent, written now if it is that client's alone."""
        if broadcast.each is None:
            return folder / _BROADCAST
        path = folder / f"{task.number:05d}_{_BROADCAST}"
        if not path.exists():
            try:
                broadcast.addressed_to(task.client_id).save(path)
            except (OSError, SafetensorError) as error:
                raise _unwritten(broadcast, self.folder, error) from error
        return path

    def _message(self, task: _Task, broadcast: Broadcast, folder: Path) -> dict[str, Any]:
        """Return what a worker is asked: paths, and what is this client's alone."""
        named = {"task": task.number, "client": task.client_id, "round": broadcast.round, "update": str(task.update)}
        if task.question is not None:
            return {**named, "message": task.question.plain()}
        own = replace(broadcast, each=None).addressed_to(task.client_id).beside()
        sent = str(self._sent(task, broadcast, folder))
        return {**named, "broadcast": sent, "message": {"kind": "train", **own}}

    def _busy(self) -> list[_Slot]:
        return [slot for slot in self._slots if slot.task is not None]

    def _hand_out(self, todo: deque[_Task], broadcast: Broadcast, folder: Path) -> None:
        """Give tasks to free workers, and start as many as there are tasks left, up to the engine's number."""
        for slot in [slot for slot in self._slots if slot.ready and slot.task is None]:
            if todo and not slot.process.alive:
                self._lose(slot, f"was {slot.process.end()}")
            elif todo:
                slot.task, slot.begun, slot.since = todo.popleft(), False, time.monotonic()
                slot.task.tries += 1
                slot.process.send(self._message(slot.task, broadcast, folder))
        starting = sum(not slot.ready for slot in self._slots)
        for _ in range(min(len(todo) - starting, self.size - len(self._slots))):
            self._slots.append(_Slot(self._spawn()))

    def _spawn(self) -> WorkerProcess:
        used = [slot.process.device for slot in self._slots]
        order = {device: (used.count(device), self._lost_on[device]) for device in self.devices}
        device = min(order, key=order.__getitem__) if order else None
        self._started += 1
        return WorkerProcess(
            self.folder / "setup.json",
            device=device,
            threads=self.options.threads,
            log=self._logs / f"worker_{self._started:04d}.log",
        )

    def _wait(self, deadline: float | None) -> list[_Slot]:
        """Wait until a worker says something or a time limit is reached, and return who has something to say."""
        limits = [] if deadline is None else [deadline]
        limits += [slot.since + limit for slot in self._slots if (limit := self._limit(slot)) is not None]
        # The caller looks at the limits again: a system call takes no wait of months.
        timeout = min(LONGEST_WAIT_S, max(0.0, min(limits) - time.monotonic())) if limits else None
        with selectors.DefaultSelector() as selector:
            for slot in self._slots:
                selector.register(slot.process, selectors.EVENT_READ, slot)
            return [key.data for key, _ in selector.select(timeout)]

    def _hear(self, slot: _Slot, todo: deque[_Task]) -> Iterator[Answer]:
        try:
            messages = slot.process.receive()
            if messages is None:
                task, how = slot.task, slot.process.ended()
                if task is not None and not slot.begun and not task.spared:
                    task.tries, task.spared = task.tries - 1, True
                yield from self._gone(slot, f"was {how}", todo)
            for message in messages or ():
                if slot in self._slots:
                    yield from self._take(slot, message)
        except BadMessageError as error:
            yield from self._gone(slot, str(error), todo)

    def _take(self, slot: _Slot, message: Message) -> Iterator[Answer]:
        """Take in a message, of which each has its turn: ready or failed, then for each task started and its answer.

        Raises:
            BadMessageError: If it is not its turn.
            ClientError: If no worker can start.
        """
        if not slot.ready:
            self._hear_start(slot, message)
            return
        task = slot.task
        if task is None or message.task != task.number:
            raise BadMessageError("answered what it was not asked")
        if message.kind == "started" and not slot.begun:
            slot.begun = True
        elif message.kind in ("answered", "dropped", "damaged") and slot.begun:
            slot.task = None
            yield _answer(task, message)
        else:
            raise BadMessageError("said the same twice")

    def _hear_start(self, slot: _Slot, message: Message) -> None:
        if message.kind == "ready":
            slot.ready, self._any_ready, self._lost_starts = True, True, 0
        elif message.kind != "failed":
            raise BadMessageError("answered before it was ready")
        elif self._any_ready:
            self._lose(slot, f"cannot start: {message.text}")
        else:
            raise ClientError(f"engine.name=workers: a worker cannot start: {message.text}")

    def _limit(self, slot: _Slot) -> float | None:
        """Return how many seconds a worker has for what it is doing."""
        if not slot.ready:
            return self.options.start_timeout_s
        return None if slot.task is None else self.options.client_timeout_s

    def _stop_hung(self, todo: deque[_Task]) -> Iterator[Answer]:
        for slot in list(self._slots):
            limit = self._limit(slot)
            if limit is None or time.monotonic() < slot.since + limit:
                continue
            if slot.ready:
                yield from self._gone(slot, f"hung: no update within engine.client_timeout_s of {limit:g} s", todo)
            else:
                self._lose(slot, f"hung: not ready within engine.start_timeout_s of {limit:g} s")

    def _stop_slow_starts(self, timeout_s: float) -> None:
        """At a round's end in time, give up workers that have been starting for as long as the whole round."""
        for slot in list(self._slots):
            if not slot.ready and time.monotonic() >= slot.since + timeout_s:
                self._remove(slot)
                _log.warning("worker replaced: process %d was not ready for a whole round", slot.process.pid)

    def _gone(self, slot: _Slot, how: str, todo: deque[_Task]) -> Iterator[Answer]:
        """Forget a worker; its client goes to the front of the queue, or is dropped after its last try.

        Args:
            slot: The worker.
            how: What it did, to go after its name.
            todo: The queue.
        """
        task = slot.task
        if task is None:
            self._lose(slot, how)
        elif task.tries < _TRIES:
            self._lose(slot, f"{how}; client {task.client_id!r} is tried again")
            todo.appendleft(task)
        else:
            self._lose(slot, how)
            yield Dropped(task.client_id, f"its worker {how} ({_TRIES} tries)")

    def _lose(self, slot: _Slot, how: str) -> None:
        """Forget a worker, and go on with one less where its place cannot be filled.

        Raises:
            ClientError: If workers cannot start and none is left.
        """
        self._remove(slot)
        if not slot.ready:
            self._lost_on[slot.process.device] += 1
            self._lost_starts += 1
        if self._lost_starts < _TRIES:
            _log.warning("worker replaced: process %d %s", slot.process.pid, how)
            return
        self._lost_starts, self.size = 0, self.size - 1
        if not self._any_ready or self.size < 1:
            raise ClientError(
                f"engine.name=workers: workers cannot start, the last one: it {how}; mend that, or raise "
                f"engine.start_timeout_s if they need longer, then resume=auto"
            )
        _log.warning(
            "worker lost: process %d %s (%d tries); workers left: %d", slot.process.pid, how, _TRIES, self.size
        )

    def _remove(self, slot: _Slot) -> None:
        slot.process.end()
        self._slots.remove(slot)


def _answer(task: _Task, message: Message) -> Answer:
    if message.kind == "damaged":
        raise CheckpointError(message.text)
    if message.kind == "dropped":
        return Dropped(task.client_id, message.text)
    by_file = task.question is None or task.question.by_file
    return UpdateFile(task.client_id, task.update) if by_file else Done(task.client_id)


def _unwritten(broadcast: Broadcast, folder: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"the broadcast of round {broadcast.round} cannot be written to {folder}: {error}; free disk space, then "
        f"resume=auto"
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
