"""What a run does just now, in a file that ``fedproxy report --watch`` reads; it is gone when the run ends."""

import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

from fedproxy.errors import CheckpointError
from fedproxy.files import write_json
from fedproxy.reporting.watched import Now

_WRITE_S = 1.0
"""Seconds until an answer is written, with all that came meanwhile."""


class NowFile:
    """Keeps the file. A run never fails for it: what cannot be written is left out.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._now = path, Now()
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._answered: dict[str, float] = {}
        self._dropped: dict[str, str] = {}

    def stage(self, name: str) -> None:
        """Note that a stage begins."""
        self._begin(Now(stage=name, since=time.time()))

    def round(self, number: int, rounds: int, clients: Sequence[str]) -> None:
        """Note that a round begins."""
        now = Now(self._now.stage, self._now.since, number, rounds, time.time(), clients, before=self._answered)
        self._begin(now)

    def client(self, name: str, dropped: str | None = None) -> None:
        """Note that a client's update was taken, or why it was dropped."""
        with self._lock:
            if dropped is None:
                self._answered[name] = time.time() - self._now.began
            else:
                self._answered.pop(name, None)
                self._dropped[name] = dropped
            if self._timer is None:
                self._timer = threading.Timer(_WRITE_S, self._later)
                self._timer.daemon = True
                self._timer.start()

    def remove(self) -> None:
        """Delete the file."""
        with self._lock, suppress(OSError):
            self._stop()
            self._path.unlink()

    def _begin(self, now: Now) -> None:
        with self._lock:
            self._stop()
            self._now, self._answered, self._dropped = now, {}, {}
            self._write()

    def _later(self) -> None:
        with self._lock:
            if self._timer is not None:  # None: what it would write is over
                self._timer = None
                self._write()

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _write(self) -> None:
        now = replace(self._now, answered=self._answered, dropped=self._dropped)
        with suppress(CheckpointError):
            write_json(self._path, asdict(now), private=True)
