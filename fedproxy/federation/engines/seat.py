"""A seat of an engine: the processes that serve one client at a time, one or one for each of a client's devices.

All of a seat's processes get every task and walk through it together; the first one alone writes what answers it. What
one of them says has its turn: ready or failed, then for each task started, how far it has come, and its answer.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedproxy.federation.engines.process import BadMessageError, Message, WorkerProcess
from fedproxy.messages import Message as Question

_GRACE_S = 2.0
"""How long to listen on after the first bad news: a death makes the others fail, and the death is the reason."""


@dataclass
class Task:
    """One client that still has to answer."""

    number: int
    client_id: str
    update: Path
    """Where the file that answers it goes."""
    question: Question | None = None
    """What it is asked; None is to train."""
    tries: int = 0
    spared: bool = False
    """Whether processes died before they took the client up, which costs no try, but only once."""


@dataclass(frozen=True)
class Verdict:
    """What came of a start or of a task."""

    kind: Literal["ready", "failed", "answered", "dropped", "damaged", "lost"]
    text: str = ""
    """One line: why it cannot start, why its client is dropped, what is damaged, or what the lost process did."""
    rank: int = 0
    """Which process is meant."""
    early: bool = False
    """Whether a lost process had not taken the task up."""
    says: Any = None
    """What the first process answered in words."""


class Seat:
    """Processes that start together, serve a client together and end together.

    Args:
        processes: In the order of their ranks.
        place: Which devices they have; None on the CPU.
    """

    def __init__(self, processes: Sequence[WorkerProcess], place: int | None) -> None:
        self.processes, self.place = processes, place
        self.ready = False
        self.task: Task | None = None
        self.share = 0.0
        """How much of the task at hand is done, as the first process says."""
        self.since = time.monotonic()
        """When it was started, or given its last task."""
        self._turns = ["starting"] * len(processes)
        self._news: dict[str, Verdict] = {}
        self._bad_since: float | None = None

    def name(self, rank: int) -> str:
        """Return what a process is called in a message about its client."""
        return "worker" if len(self.processes) == 1 else f"process {rank + 1} of {len(self.processes)}"

    @property
    def settles_at(self) -> float | None:
        """When the bad news that came is all that counts; None while there is none."""
        return None if self._bad_since is None else self._bad_since + _GRACE_S

    def listening(self) -> list[int]:
        """Return the processes that may still say something."""
        return [rank for rank, turn in enumerate(self._turns) if turn != "gone"]

    def give(self, task: Task, message: Mapping[str, Any]) -> None:
        """Send a task to all processes; the first one is told where its answer goes."""
        self.task, self.share, self.since = task, 0.0, time.monotonic()
        self._turns, self._news, self._bad_since = ["given"] * len(self.processes), {}, None
        for rank, process in enumerate(self.processes):
            process.send({**message, **({"update": str(task.update)} if rank == 0 else {})})

    def dead(self) -> tuple[int, str] | None:
        """Return which process has ended while nobody listened, if one has, and how."""
        ended = [rank for rank, process in enumerate(self.processes) if not process.alive]
        return (ended[0], f"was {self.processes[ended[0]].end()}") if ended else None

    def hear(self, rank: int) -> None:
        """Take in what a process has to say."""
        try:
            messages = self.processes[rank].receive()
            if messages is None:
                early = self._turns[rank] == "given"
                self._tell(rank, Verdict("lost", f"was {self.processes[rank].ended()}", rank, early), "gone")
            for message in messages or ():
                self._take(rank, message)
        except BadMessageError as error:
            self._tell(rank, Verdict("lost", str(error), rank), "gone")

    def verdict(self) -> Verdict | None:
        """Return what came of the start or the task at hand, once that is certain, and be free again."""
        waiting = any(turn in ("starting", "given", "begun") for turn in self._turns)
        late = self.settles_at is not None and time.monotonic() >= self.settles_at
        if not self._news or (waiting and not late):
            return None
        order = ("damaged", "lost", "dropped", "failed", "answered", "ready")
        found = next(self._news[kind] for kind in order if kind in self._news)
        self._news, self._bad_since = {}, None
        return found

    def end(self) -> None:
        """End all processes."""
        for process in self.processes:
            process.end()

    def _take(self, rank: int, message: Message) -> None:
        turn, kind = self._turns[rank], message.kind
        if turn == "starting":
            if kind not in ("ready", "failed"):
                raise BadMessageError("answered before it was ready")
            turn = "gone" if kind == "failed" else "idle"  # it ends now, and has said why
            self._tell(rank, Verdict(kind, self._said(rank, message.text), rank), turn)
        elif self.task is None or message.task != self.task.number:
            raise BadMessageError("answered what it was not asked")
        elif turn == "given" and kind == "started":
            self._turns[rank] = "begun"
        elif turn == "begun" and kind == "working":
            self.share = message.share if rank == 0 else self.share
        elif turn == "begun" and kind in ("answered", "dropped", "damaged"):
            text = message.text if kind == "damaged" else self._said(rank, message.text)
            self._tell(rank, Verdict(kind, text, rank, says=message.says), "idle")
        else:
            raise BadMessageError("said the same twice")

    def _said(self, rank: int, text: str) -> str:
        return text if len(self.processes) == 1 or not text else f"{self.name(rank)}: {text}"

    def _tell(self, rank: int, news: Verdict, turn: str) -> None:
        """Note what a process did; of news of one kind the first counts, of good news that of the first process."""
        self._turns[rank] = turn
        if news.kind not in self._news or rank == 0:
            self._news[news.kind] = news
        if news.kind not in ("ready", "answered"):
            self._bad_since = self._bad_since or time.monotonic()
