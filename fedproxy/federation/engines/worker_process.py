"""One worker process as the server sees it: a pipe each way with one JSON object per line, and how it ended."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

Message = dict[str, Any]
LONGEST_WAIT_S = 3600.0
"""Longest single wait for a process to say something: what waits longer waits again."""


class WorkerProcess:
    """A process that runs :mod:`fedproxy.federation.worker`.

    It has a process group of its own, so that Ctrl-C reaches the server alone, and ends by itself when the server does.

    Args:
        setup: JSON file that says how to make the client.
        device: Index of the accelerator it trains on; None for the CPU.
        threads: CPU threads inside its operations.
        log: Where its standard error goes.
    """

    def __init__(self, setup: Path, *, device: int | None, threads: int, log: Path) -> None:
        self.log, self.device = log, device
        self._unread = b""
        module = "fedproxy.federation.worker"
        command = [sys.executable, "-m", module, str(setup), "" if device is None else str(device), str(threads)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": str(threads)}
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                process_group=0,
                bufsize=0,
            )

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

    def send(self, message: Message) -> None:
        """Send one message; a worker that is gone shows when it is received from."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[Message] | None:
        """Return the messages that have arrived whole, or None where the process is gone."""
        read = os.read(self.fileno(), 1 << 16)
        if not read:
            return None
        *lines, self._unread = (self._unread + read).split(b"\n")
        return [json.loads(line) for line in lines]

    def end(self) -> str:
        """Kill the process if it still runs, and return in words how it ended."""
        if self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        code = self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        last = self.log.read_text(errors="replace").split("\n")[-2:-1]
        return f"ended with exit code {code}{': ' + last[0].strip() if last else ''}"

    def ended(self) -> str:
        """Wait for a process whose pipe is closed, and return in words how it ended."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10)
        return self.end()
