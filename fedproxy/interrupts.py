"""Ctrl-C, SIGTERM and SIGHUP end a command alike: files are closed, a report says why, and the run can go on."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""What Ctrl-C, docker stop, Slurm, systemd and a closed terminal send."""
SIGNALLED = 128
"""What shells and schedulers add to a signal's number for the exit code."""
_SAME_REQUEST_S = 5.0
"""Signals that follow within this time ask for what the first one asked for."""


class Terminated(KeyboardInterrupt):
    """A signal asked the process to end.

    Args:
        number: The signal.
        hint: How to go on.
    """

    def __init__(self, number: int, hint: str = "") -> None:
        super().__init__(hint)
        self.number = number


class _Received:
    """The last signal, kept because libraries turn the exception into others."""

    number: int | None = None
    since = 0.0


@contextmanager
def handled() -> Iterator[None]:
    """Raise :class:`Terminated` in the main thread at each of :data:`SIGNALS`, for the length of the context.

    A signal that is ignored (``nohup``) stays ignored.
    """
    _Received.number = None
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _terminate)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def _terminate(number: int, frame: FrameType | None) -> None:
    if _Received.number is not None and time.monotonic() - _Received.since < _SAME_REQUEST_S:
        return
    _Received.number, _Received.since = number, time.monotonic()
    raise Terminated(number)


def check_interrupt() -> None:
    """Raise :class:`Terminated` if a signal came and a library swallowed the exception, as imports do."""
    if _Received.number is not None:
        raise Terminated(_Received.number)


def interruption(error: BaseException, hint: str = "") -> KeyboardInterrupt | None:
    """Return what to raise where an error comes from Ctrl-C or a signal, or None where it does not.

    Args:
        error: What ended the work; after a signal that may be any error, of a closed terminal for example.
        hint: How to go on.
    """
    if _Received.number is not None:
        return Terminated(_Received.number, hint)
    return KeyboardInterrupt(hint) if isinstance(error, KeyboardInterrupt) else None


def describe(interrupt: KeyboardInterrupt) -> str:
    """Return in one line what ended the work and how to go on."""
    number = interrupt.number if isinstance(interrupt, Terminated) else signal.SIGINT
    how = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
    return "; ".join(filter(None, (how, str(interrupt))))


def exit_code(interrupt: KeyboardInterrupt) -> int:
    """Return the exit code that shells and schedulers know: :data:`SIGNALLED` and the number of the signal."""
    return SIGNALLED + (interrupt.number if isinstance(interrupt, Terminated) else signal.SIGINT)
