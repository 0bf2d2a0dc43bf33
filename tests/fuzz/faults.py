"""A command that breaks its promises, to show that the fuzz test sees it: ``python -m tests.fuzz.faults WHICH``."""

import os
import shutil
import signal
import sys
import time
from pathlib import Path

from fedproxy.command import run_command
from fedproxy.errors import ConfigError


def good() -> None:
    Path("run").mkdir()
    Path("run/kept.txt").write_text("kept")


def refusal() -> None:
    print("warning: odd", file=sys.stderr)
    raise ConfigError("seed must be a whole number, got 'x'; give one")


def traceback() -> None:
    raise KeyError("lost")


def logged() -> None:
    print("Traceback (most recent call last):")


def crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def hang() -> None:
    time.sleep(60)


def memory() -> None:
    bytearray(3 << 29)


def too_much_memory() -> None:
    bytearray(1 << 36)


def deleted() -> None:
    shutil.rmtree("other")


def changed() -> None:
    Path("notes.txt").write_text("mime")


def made() -> None:
    Path("../beside").mkdir()


def escape() -> None:
    _end("a \x1b[31mred value")


def long() -> None:
    _end("x" * 5000)


def _end(message: str) -> None:
    """End as a command that did not pass its error through the one border."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def main(arguments: list[str]) -> None:
    """Break the promise that the argument names."""
    globals()[arguments[0]]()


if __name__ == "__main__":
    run_command(main, __doc__)
