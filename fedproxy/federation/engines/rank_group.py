"""A client that several processes train together, one for each device; to an engine it is like any other."""

import selectors
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from fedproxy.errors import CheckpointError, ClientError
from fedproxy.federation.client.base import RemoteClient
from fedproxy.federation.engines.worker_process import LONGEST_WAIT_S, BadMessageError, Message, WorkerProcess
from fedproxy.files import private_folder, write_json
from fedproxy.protocol import Broadcast, Done, UpdateFile
from fedproxy.protocol import Message as Question

_TRIES = 2
"""How often a client is tried one of whose processes dies."""
_GRACE_S = 2.0
"""How long to listen on after the first bad news: a death makes the others fail, and the death is the reason."""


class RankGroup:
    """Trains clients in processes of their own, which start when the first client comes.

    All processes walk through the same training; the first one sends the update, the others write nothing. When one
    dies or fails all are ended, and new ones start for the next client.

    Args:
        remote: How each process makes the client; ``rank`` and ``rendezvous``, a file by which the processes find each
            other, are added to its options.
        count: Number of processes.
        scratch: Folder for messages' files; None is the system's.
    """

    def __init__(self, remote: RemoteClient, count: int, *, scratch: str | None = None) -> None:
        self.remote, self.count = remote, count
        self._scratch = scratch
        self._folder: Path | None = None
        self._processes: list[WorkerProcess] = []
        self._sent: tuple[Broadcast, Path] | None = None
        self._tasks = self._starts = 0

    @property
    def pids(self) -> list[int]:
        """Process ids of the processes that run, in the order of their ranks."""
        return [process.pid for process in self._processes]

    def train(self, broadcast: Broadcast, client_id: str, *, deadline: float | None = None) -> UpdateFile:
        """Train one client; see :class:`fedproxy.federation.client.base.Client`.

        Raises:
            ClientError: If a process fails, or dies in every try, or ``deadline`` passes.
            CheckpointError: If files cannot be written.
        """
        message = {"kind": "train", **broadcast.beside()}
        return UpdateFile(client_id, self._do(broadcast, {"message": message, "client": client_id}, deadline))

    def answer(self, message: Question, client_id: str) -> UpdateFile | Done:
        """Let one client answer a message; see :class:`fedproxy.federation.client.base.Client`."""
        path = self._do(Broadcast(0, {}), {"message": message.plain(), "client": client_id}, None)
        return UpdateFile(client_id, path) if message.by_file else Done(client_id)

    def _do(self, broadcast: Broadcast, task: Mapping[str, Any], deadline: float | None) -> Path:
        died: _DiedError | None = None
        for _ in range(_TRIES):
            try:
                return self._try(broadcast, task, deadline)
            except _DiedError as error:
                died = error
        raise ClientError(f"{died} ({_TRIES} tries)")

    def close(self) -> None:
        """End the processes and remove their files."""
        self._end()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._folder = self._sent = None

    def _try(self, broadcast: Broadcast, asked: Mapping[str, Any], deadline: float | None) -> Path:
        try:
            path = self._write(broadcast)
            if not self._processes:
                self._start(path.parent.parent)
            self._tasks += 1
            update = path.parent / f"update_{self._tasks:05d}.safetensors"
            task = {**asked, "task": self._tasks, "round": broadcast.round, "broadcast": str(path)}
            for rank, process in enumerate(self._processes):
                process.send({**task, **({"update": str(update)} if rank == 0 else {})})
            self._wait(deadline)
            return update
        except BaseException:
            self._end()
            raise

    def _write(self, broadcast: Broadcast) -> Path:
        """Return the broadcast's file; a new broadcast takes the place of the old one and of the updates to it."""
        if self._sent is not None and self._sent[0].same_file(broadcast):
            return self._sent[1]
        try:
            if self._folder is None:
                if self._scratch is not None:
                    private_folder(self._scratch)
                self._folder = Path(tempfile.mkdtemp(prefix="ranks_", dir=self._scratch)).absolute()
            if self._sent is not None:
                shutil.rmtree(self._sent[1].parent)
            path = Path(tempfile.mkdtemp(prefix="round_", dir=self._folder)) / "broadcast.safetensors"
            broadcast.save(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"the broadcast of round {broadcast.round} cannot be written for the client's processes: {error}; "
                f"free disk space, then resume=auto"
            ) from error
        self._sent = broadcast, path
        return path

    def _start(self, folder: Path) -> None:
        self._starts += 1
        place = Path(tempfile.mkdtemp(prefix="start_", dir=folder))
        logs = place if self.remote.logs is None else Path(self.remote.logs)
        for rank in range(self.count):
            options = {**self.remote.options, "rank": rank, "rendezvous": str(place / "rendezvous")}
            setup = place / f"setup_{rank}.json"
            write_json(setup, asdict(replace(self.remote, options=options)))
            log = logs / f"{folder.name}_{self._starts:03d}_{rank}.log"
            threads = max(1, torch.get_num_threads() // self.count)
            self._processes.append(WorkerProcess(setup, device=None, threads=threads, log=log))

    def _wait(self, deadline: float | None) -> None:
        """Wait until every process has trained the client.

        Raises:
            _DiedError: If a process is gone.
            ClientError: If one fails, or ``deadline`` passes.
            CheckpointError: If a file of the run is damaged.
        """
        news = _News(len(self._processes), self._tasks)
        limit = deadline
        with selectors.DefaultSelector() as selector:
            for rank, process in enumerate(self._processes):
                selector.register(process, selectors.EVENT_READ, rank)
            while news.waiting:
                timeout = None if limit is None else min(LONGEST_WAIT_S, max(0.0, limit - time.monotonic()))
                ready = [key.data for key, _ in selector.select(timeout)]
                for rank in ready:
                    if not news.take(rank, self._processes[rank]):
                        selector.unregister(self._processes[rank])
                if news.bad:
                    grace = time.monotonic() + _GRACE_S
                    limit = grace if limit is None else min(limit, grace)
                if limit is not None and time.monotonic() >= limit:
                    break
        news.judge()

    def _end(self) -> None:
        for process in self._processes:
            process.end()
        self._processes = []


class _DiedError(Exception):
    """A process of the group is gone."""


class _News:
    """What the processes of a group have said of the client under way."""

    def __init__(self, count: int, task: int) -> None:
        self.count, self.task = count, task
        self.waiting, self._said = set(range(count)), set[tuple[int, str]]()
        self._died, self._failed, self._damaged = "", "", ""

    @property
    def bad(self) -> bool:
        """Whether the client can no longer succeed."""
        return bool(self._died or self._failed or self._damaged)

    def take(self, rank: int, process: WorkerProcess) -> bool:
        """Hear what a process has to say; False if it is gone."""
        name = f"process {rank + 1} of {self.count}"
        try:
            messages = process.receive()
            if messages is None:
                if rank in self.waiting:
                    self._died = self._died or f"its {name} was {process.ended()}"
                self.waiting.discard(rank)
                return False
            for message in messages:
                self._hear(rank, name, message)
        except BadMessageError as error:
            self._died = self._died or f"its {name} {error}"
            self.waiting.discard(rank)
            return False
        return True

    def _hear(self, rank: int, name: str, message: Message) -> None:
        if message.task not in (None, self.task):
            raise BadMessageError("answered what it was not asked")
        if (rank, message.kind) in self._said:
            raise BadMessageError("said the same twice")
        self._said.add((rank, message.kind))
        if message.kind not in ("ready", "started"):
            self.waiting.discard(rank)
        if message.kind == "damaged":
            self._damaged = self._damaged or message.text
        if message.kind in ("failed", "dropped"):
            self._failed = self._failed or f"{name}: {message.text}"

    def judge(self) -> None:
        if self._damaged:
            raise CheckpointError(self._damaged)
        if self._died:
            raise _DiedError(self._died)
        if self._failed:
            raise ClientError(self._failed)
        if self.waiting:
            raise ClientError("the round's time is over; raise federation.round_timeout_s")
