"""One worker process as the server sees it: a pipe each way with one JSON object per line, and how it ended."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from fedproxy.errors import CheckpointError, one_line
from fedproxy.federation.client.log import shown
from fedproxy.federation.engines.environment import client_environment
from fedproxy.files import parse_json, private_folder

LONGEST_WAIT_S = 3600.0
"""Longest single wait for a process to say something: what waits longer waits again."""
_LONGEST_LINE = 1 << 14
"""Most bytes of a message, which holds a number and a line of text."""
_ENDING_S = 5.0
"""How long a process that has closed its pipe may take to end."""


@dataclass(frozen=True)
class Message:
    """What a worker says."""

    kind: Literal["ready", "failed", "started", "working", "answered", "dropped", "damaged"]
    task: int | None = None
    """Which task was started, goes on, is answered, has its client dropped, or met a damaged file of the run."""
    text: str = ""
    """Why the worker cannot start or its client is dropped, or what is damaged: one line."""
    says: Any = None
    """The answer, where it is in words."""
    share: float = 0.0
    """How much of a task that goes on is done, in [0, 1]."""

    @classmethod
    def parse(cls, line: bytes) -> "Message":
        """Return what a line says.

        Raises:
            BadMessageError: If it is none of these.
        """
        try:
            said = parse_json(line, dict)
        except ValueError as error:
            raise BadMessageError(f"sent a line that is not a message: {error}") from None
        match said:
            case {"ready": True}:
                return cls("ready")
            case {"failed": str(text)}:
                return cls("failed", text=one_line(text))
            case {"started": int(task)}:
                return cls("started", task)
            case {"task": int(task), "share": float(share) | int(share)} if 0 <= share <= 1:
                return cls("working", task, share=float(share))
            case {"task": int(task), "dropped": str(text)}:
                return cls("dropped", task, one_line(text))
            case {"task": int(task), "damaged": str(text)}:
                return cls("damaged", task, one_line(text))
            case {"task": int(task)} if not {"share", "dropped", "damaged"} & set(said):
                return cls("answered", task, says=said.get("says"))
        raise BadMessageError("sent a line that is not a message")


class BadMessageError(Exception):
    """A worker said what no worker says; the text goes after its name."""


class WorkerProcess:
    """A process that runs :mod:`fedproxy.federation.engines.worker`.

    It has a process group of its own, so that Ctrl-C reaches the server alone, and ends by itself when the server does.

    Args:
        setup: JSON file that says how to make the client.
        device: Index of the accelerator it trains on; None for the CPU.
        threads: CPU threads inside its operations.
        log: Where its standard error goes; it stays on the clients' side and is not read here.
    """

    def __init__(self, setup: Path, *, device: int | None, threads: int, log: Path) -> None:
        self.log = log
        self._unread = b""
        module = "fedproxy.federation.engines.worker"
        command = [sys.executable, "-m", module, str(setup), "" if device is None else str(device), str(threads)]
        with _begin(log) as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=client_environment(threads),
                process_group=0,
                bufsize=0,
            )
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)  # a worker that does not read holds nobody up

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when there is something to receive."""
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    def send(self, message: Mapping[str, Any]) -> None:
        """Send one message; a worker that is gone, or does not read, shows when it is received from."""
        assert self._process.stdin is not None
        line = json.dumps(message).encode() + b"\n"
        with suppress(BrokenPipeError):
            if self._process.stdin.write(line) != len(line):
                self._kill()

    def receive(self) -> list[Message] | None:
        """Return the messages that have arrived whole, or None where the process is gone.

        Raises:
            BadMessageError: If a line is too long or is not a message.
        """
        read = os.read(self.fileno(), 1 << 16)
        if not read:
            return None
        *lines, self._unread = (self._unread + read).split(b"\n")
        if any(len(line) > _LONGEST_LINE for line in (*lines, self._unread)):
            raise BadMessageError(f"sent a line of more than {_LONGEST_LINE} bytes")
        return [Message.parse(line) for line in lines]

    def end(self) -> str:
        """Kill the process if it still runs, and return in words how it ended."""
        if self._process.poll() is None:
            self._kill()
        code = self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        if code < 0:
            known = {number.value: number.name for number in signal.Signals}
            return f"killed by {known.get(-code, f'signal {-code}')}"
        return f"ended with exit code {code}; details in {shown(self.log)}"

    def ended(self) -> str:
        """Wait for a process whose pipe is closed, and return in words how it ended."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=_ENDING_S)
        lived, how = self.alive, self.end()
        return "killed, since it had closed its output" if lived else how

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


def _begin(log: Path) -> BinaryIO:
    """Open a new log; whatever lay in its place is put away first, since clients can write there.

    Raises:
        CheckpointError: If it cannot be made.
    """
    try:
        private_folder(log.parent)
        log.unlink(missing_ok=True)
        return os.fdopen(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb")
    except OSError as error:
        raise CheckpointError(f"{log} cannot be written ({error.strerror}); free the path, then resume=auto") from error
