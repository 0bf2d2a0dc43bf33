"""The one supervisor of processes: it seats clients, replaces what dies or hangs, and keeps every time limit."""

import logging
import selectors
import shutil
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fedproxy.errors import CheckpointError, ClientError, one_line
from fedproxy.federation.client.base import RemoteClient
from fedproxy.federation.engines.base import late
from fedproxy.federation.engines.process import LONGEST_WAIT_S, WorkerProcess
from fedproxy.federation.engines.seat import Seat, Task, Verdict
from fedproxy.files import private_folder, write_json
from fedproxy.messages import Answer, Answers, Dropped, Message, UpdateFile, Working, nobody
from fedproxy.protocol import Broadcast

_log = logging.getLogger(__name__)
_BROADCAST = "broadcast.safetensors"
_TRIES = 2
"""How often a client is tried whose processes die or hang, and how often in a row processes may fail to start."""


@dataclass
class Limits:
    """How long processes may take."""

    client_s: float | None = None
    """For a client; None waits until the round ends."""
    start_s: float = 600.0
    """To start and load the proxy."""


class WorkerPool:
    """Running processes of one federation, in seats of as many as serve a client together.

    Args:
        remote: How a process makes its client.
        folder: Where messages' files lie; emptied now and removed at the end.
        size: Most seats.
        threads: CPU threads inside a process's operations.
        limits: Time limits.

    Raises:
        CheckpointError: If the folder cannot be written.
    """

    def __init__(
        self, remote: RemoteClient, folder: Path, *, size: int, threads: int, limits: Limits | None = None
    ) -> None:
        self.remote, self.size, self.threads, self.limits = remote, size, threads, limits or Limits()
        self._base, self._seats, self._started, self._lost_starts = folder, list[Seat](), 0, 0
        self._any_ready, self._lost_on = False, Counter[int | None]()
        self.working: Working = nobody
        try:
            shutil.rmtree(folder, ignore_errors=True)
            self.folder = Path(tempfile.mkdtemp(dir=private_folder(folder))).absolute()
            self._logs = self.folder if remote.logs is None else Path(remote.logs)
            write_json(self.folder / "setup.json", asdict(remote))
        except OSError as error:
            raise CheckpointError(f"{folder} cannot be written ({error}); free disk space, then resume=auto") from error

    @property
    def pids(self) -> list[int]:
        """Process ids of the processes that run, by seat and rank."""
        return [process.pid for seat in self._seats for process in seat.processes]

    def run(self, broadcast: Broadcast, client_ids: Sequence[str], *, timeout_s: float | None = None) -> Answers:
        """Run one round's clients; see :class:`fedproxy.messages.Sites`.

        Raises:
            ClientError: If processes cannot start and none is left.
            CheckpointError: If the broadcast cannot be written.
        """
        return self._serve(broadcast, dict.fromkeys(client_ids), timeout_s)

    def ask(self, messages: Mapping[str, Message], *, timeout_s: float | None = None) -> Answers:
        """Send each client its message; see :class:`fedproxy.messages.Sites`.

        Args:
            messages: What each is asked.
            timeout_s: Seconds after which clients that have not answered are dropped; None waits for all.

        Raises:
            ClientError: If processes cannot start and none is left.
            CheckpointError: If what a client kept cannot be used.
        """
        return self._serve(Broadcast(0, {}), messages, timeout_s)

    def close(self) -> None:
        """End all processes and remove their files."""
        for seat in list(self._seats):
            self._remove(seat)
        shutil.rmtree(self._base, ignore_errors=True)

    def _serve(self, broadcast: Broadcast, asked: Mapping[str, Message | None], timeout_s: float | None) -> Answers:
        deadline: float | None = None
        folder = self._begin(broadcast, trains=None in asked.values())
        todo = deque(
            Task(number, client_id, folder / f"update_{number:05d}.safetensors", asked[client_id])
            for number, client_id in enumerate(asked)
        )
        try:
            while todo or self._busy():
                if deadline is not None and timeout_s is not None and time.monotonic() >= deadline:
                    left = [seat.task for seat in self._busy() if seat.task is not None] + list(todo)
                    yield from (Dropped(task.client_id, _late(task, timeout_s)) for task in left)
                    self._stop_slow_starts(timeout_s)
                    return
                self._hand_out(todo, broadcast, folder)
                if deadline is None and timeout_s is not None and self._busy():
                    deadline = time.monotonic() + timeout_s  # what processes need to start is not the clients' time
                self._listen(deadline)
                for seat in self._busy():
                    if seat.task is not None and seat.share:
                        self.working(broadcast.round, seat.task.client_id, seat.share)
                for seat in list(self._seats):
                    verdict = seat.verdict()
                    if verdict is not None:
                        yield from self._follow(seat, verdict, todo)
                yield from self._stop_hung(todo)
        finally:
            for seat in self._busy():
                self._remove(seat)

    def _begin(self, broadcast: Broadcast, *, trains: bool) -> Path:
        """Return a new folder for what a round's files hold, with the broadcast in it where all clients get the same.

        No two runs share a folder, whatever their rounds: processes know what they have read by its path.
        """
        try:
            for old in self.folder.glob("round_*"):
                shutil.rmtree(old, ignore_errors=True)  # clients write there
            folder = Path(tempfile.mkdtemp(prefix=f"round_{broadcast.round:04d}_", dir=self.folder))
            if trains and broadcast.each is None:
                broadcast.save(folder / _BROADCAST)
        except OSError as error:
            raise self._unwritten(broadcast, error) from error
        return folder

    def _message(self, task: Task, broadcast: Broadcast, folder: Path) -> dict[str, Any]:
        """Return what a client's processes are told: paths, and what is this client's alone."""
        named = {"task": task.number, "client": task.client_id, "round": broadcast.round}
        if task.question is None:
            beside = replace(broadcast, each=None).addressed_to(task.client_id).beside()
            sent = folder / _BROADCAST
            if broadcast.each is not None:
                sent = self._written(folder / f"{task.number:05d}_{_BROADCAST}", broadcast, task.client_id)
            return {**named, "broadcast": str(sent), "message": {"kind": "train", **beside}}
        named["message"] = task.question.plain()
        if states := task.question.tensors:  # written once where clients are sent the same
            path = folder / f"states_{id(states)}.safetensors"
            named["broadcast"] = str(self._written(path, Broadcast(0, {}, extras=states), task.client_id))
        return named

    def _written(self, path: Path, broadcast: Broadcast, client_id: str) -> Path:
        try:
            if not path.exists():
                broadcast.addressed_to(client_id).save(path)
        except OSError as error:
            raise self._unwritten(broadcast, error) from error
        return path

    def _unwritten(self, broadcast: Broadcast, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"the broadcast of round {broadcast.round} cannot be written to {self.folder}: {error}; free disk space, "
            "then resume=auto"
        )

    def _busy(self) -> list[Seat]:
        return [seat for seat in self._seats if seat.task is not None]

    def _hand_out(self, todo: deque[Task], broadcast: Broadcast, folder: Path) -> None:
        """Give tasks to free seats, and start as many seats as there are tasks left, up to their number."""
        for seat in [seat for seat in self._seats if seat.ready and seat.task is None]:
            if todo and (dead := seat.dead()):
                self._lose(seat, *dead)
            elif todo:
                task = todo.popleft()
                task.tries += 1
                seat.give(task, self._message(task, broadcast, folder))
        starting = sum(not seat.ready for seat in self._seats)
        for _ in range(min(len(todo) - starting, self.size - len(self._seats))):
            self._seats.append(self._start())

    def _start(self) -> Seat:
        used = [seat.place for seat in self._seats]
        order = {place: (used.count(place), self._lost_on[place]) for place in self.remote.devices}
        place = min(order, key=order.__getitem__) if order else None
        self._started += 1
        name, setups = f"{self._started:04d}", [self.folder / "setup.json"]
        if self.remote.ranks > 1:
            together = Path(tempfile.mkdtemp(prefix="start_", dir=self.folder))
            setups = [together / f"setup_{rank}.json" for rank in range(self.remote.ranks)]
            for rank, setup in enumerate(setups):
                own = {"rank": rank, "rendezvous": str(together / "rendezvous")}
                write_json(setup, asdict(replace(self.remote, options={**self.remote.options, **own})))
        logs = [f"worker_{name}" if len(setups) == 1 else f"worker_{name}_{rank}" for rank in range(len(setups))]
        return Seat(
            [
                WorkerProcess(setup, device=place, threads=self.threads, log=self._logs / f"{log}.log")
                for setup, log in zip(setups, logs, strict=True)
            ],
            place,
        )

    def _listen(self, deadline: float | None) -> None:
        """Wait until a process says something or a time limit is reached, and hear who has something to say."""
        limits = [] if deadline is None else [deadline]
        limits += [seat.since + limit for seat in self._seats if (limit := self._limit(seat)) is not None]
        limits += [seat.settles_at for seat in self._seats if seat.settles_at is not None]
        # The caller looks at the limits again: a system call takes no wait of months.
        timeout = min(LONGEST_WAIT_S, max(0.0, min(limits) - time.monotonic())) if limits else None
        with selectors.DefaultSelector() as selector:
            for seat in self._seats:
                for rank in seat.listening():
                    selector.register(seat.processes[rank], selectors.EVENT_READ, (seat, rank))
            for key, _ in selector.select(timeout):
                seat, rank = key.data
                seat.hear(rank)

    def _follow(self, seat: Seat, verdict: Verdict, todo: deque[Task]) -> Iterator[Answer]:
        """Do what follows from what came of a start or a task.

        Raises:
            ClientError: If no process can start.
            CheckpointError: If a file of the run is damaged.
        """
        task = seat.task
        if verdict.kind == "ready":
            seat.ready, self._any_ready, self._lost_starts = True, True, 0
        elif verdict.kind == "failed" and not self._any_ready:
            raise ClientError(f"{self._key}: a worker cannot start: {verdict.text}")
        elif verdict.kind == "failed":
            self._lose(seat, verdict.rank, f"cannot start: {verdict.text}")
        elif verdict.kind == "lost" or task is None:
            if task is not None and verdict.early and not task.spared:
                task.tries, task.spared = task.tries - 1, True
            yield from self._gone(seat, verdict.rank, verdict.text, todo)
        else:
            seat.task = None
            if verdict.kind != "answered" and self.remote.ranks > 1:
                self._remove(seat)  # the others wait in the middle of a step
            yield _answer(task, verdict)

    def _limit(self, seat: Seat) -> float | None:
        """Return how many seconds a seat has for what it is doing."""
        if not seat.ready:
            return self.limits.start_s
        return None if seat.task is None else self.limits.client_s

    def _stop_hung(self, todo: deque[Task]) -> Iterator[Answer]:
        for seat in list(self._seats):
            limit = self._limit(seat)
            if limit is None or time.monotonic() < seat.since + limit:
                continue
            if seat.ready:
                how = f"hung: no update within engine.client_timeout_s of {limit:g} s"
                yield from self._gone(seat, 0, how, todo)
            else:
                self._lose(seat, 0, f"hung: not ready within engine.start_timeout_s of {limit:g} s")

    def _stop_slow_starts(self, timeout_s: float) -> None:
        """At a round's end in time, give up processes that have been starting for as long as the whole round."""
        for seat in list(self._seats):
            if not seat.ready and time.monotonic() >= seat.since + timeout_s:
                self._remove(seat)
                pid = seat.processes[0].pid
                _log.warning("worker replaced: process %d was not ready for a whole round", pid)

    def _gone(self, seat: Seat, rank: int, how: str, todo: deque[Task]) -> Iterator[Answer]:
        """Forget a seat; its client goes to the front of the queue, or is dropped after its last try.

        Args:
            seat: The seat.
            rank: Which of its processes is to blame.
            how: What that did, to go after its name.
            todo: The queue.
        """
        task = seat.task
        if task is None:
            self._lose(seat, rank, how)
        elif task.tries < _TRIES:
            self._lose(seat, rank, f"{how}; client {task.client_id!r} is tried again")
            todo.appendleft(task)
        else:
            self._lose(seat, rank, how)
            yield Dropped(task.client_id, f"its {seat.name(rank)} {how} ({_TRIES} tries)")

    def _lose(self, seat: Seat, rank: int, how: str) -> None:
        """Forget a seat, and go on with one less where its place cannot be filled.

        Raises:
            ClientError: If processes cannot start and none is left.
        """
        self._remove(seat)
        pid = seat.processes[rank].pid
        if not seat.ready:
            self._lost_on[seat.place] += 1
            self._lost_starts += 1
        if self._lost_starts < _TRIES:
            _log.warning("worker replaced: process %d %s", pid, how)
            return
        self._lost_starts, self.size = 0, self.size - 1
        if not self._any_ready or self.size < 1:
            raise ClientError(
                f"{self._key}: workers cannot start, the last one: it {how}; mend that, or raise "
                f"engine.start_timeout_s if they need longer, then resume=auto"
            )
        _log.warning("worker lost: process %d %s (%d tries); workers left: %d", pid, how, _TRIES, self.size)

    def _remove(self, seat: Seat) -> None:
        seat.end()
        self._seats.remove(seat)

    @property
    def _key(self) -> str:
        ranks = self.remote.ranks
        return "engine.name=workers" if ranks == 1 else f"trainer.devices: {ranks} processes for each client"


def _late(task: Task, timeout_s: float) -> str:
    return late(timeout_s) if task.question is None else f"late: no answer within {timeout_s:g} s"


def _answer(task: Task, verdict: Verdict) -> Answer:
    if verdict.kind == "damaged":
        raise CheckpointError(verdict.text)
    if verdict.kind == "dropped":
        return Dropped(task.client_id, verdict.text)
    if task.question is None:
        return UpdateFile(task.client_id, task.update)
    try:
        return task.question.answered(task.client_id, verdict.says, task.update)
    except ClientError as error:
        return Dropped(task.client_id, one_line(error))
