"""A small process between FedProxy and a program of Flower's: when either ends, nothing of the other stays.

``python -I keeper.py COMMAND...``, with a pipe on standard input whose other end FedProxy holds. The program and all
that it started are ended when the pipe closes, which it does by ``kill -9`` of FedProxy too; and what is left of it is
ended when the program itself does. It imports the standard library alone.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time

_SUBREAPER, _DEATH_SIGNAL = 36, 1
_LOOK_S, _GRACE_S = 0.2, 8.0


def main(command: list[str]) -> int:
    """Run a command until it ends or the pipe closes, and return its exit status."""
    _prctl(_SUBREAPER, 1)  # orphans of the program become ours
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the pipe says when to end
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_prepared)
    while child.poll() is None and not _closed(_LOOK_S):
        pass
    if child.poll() is None:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_GRACE_S)
    _end_all()
    return child.wait()


def _prepared() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    _prctl(_DEATH_SIGNAL, signal.SIGKILL)


def _closed(seconds: float) -> bool:
    ready, _, _ = select.select([0], [], [], seconds)
    return bool(ready) and not os.read(0, 1)


def _end_all() -> None:
    """Kill all descendants; those of the killed become children of this process."""
    until = time.monotonic() + _GRACE_S
    while time.monotonic() < until:
        for pid in _children():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.05)


def _children() -> list[int]:
    found = []
    for name in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else []):
        with contextlib.suppress(OSError, ValueError, IndexError), open(f"/proc/{name}/stat") as file:
            if int(file.read().rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(name))
    return found


def _prctl(option: int, value: int) -> None:
    with contextlib.suppress(OSError, AttributeError):  # Linux alone has it
        ctypes.CDLL(None).prctl(option, int(value), 0, 0, 0)


if __name__ == "__main__":
    sys.exit(min(255, abs(main(sys.argv[1:]))))
