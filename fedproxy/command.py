"""What all commands share: help without heavy imports, errors as one line, exit codes."""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress

from fedproxy.errors import CAUSE_HINT, LOG_NAME, FedProxyError, message_of, printable_lines, shows_causes
from fedproxy.interrupts import SIGNALLED, describe, exit_code, handled, interruption
from fedproxy.machine import wait_asleep

BAD_INPUT = 2
COMMANDS = {
    "fit": "run a recipe from compression to report",
    "compress": "make a proxy and measure it, without clients",
    "evaluate": "score any model",
    "compare": "run recipes against each other and write one report",
    "report": "make a run's report again, or pair two runs",
    "recipes": "list, show, copy and plan recipes",
    "assets": "fetch the models and data that recipes call asset:NAME",
    "site": "a data owner's resident process",
    "hub": "the server's side of real sites",
    "doctor": "say what this machine can do",
    "completion": "print what a shell needs to complete words",
}
"""Module of this package to what it is for."""


def run_command(
    main: Callable[[Sequence[str]], int | None],
    usage: str,
    describe_keys: Callable[[Sequence[str]], str] | None = None,
) -> None:
    """Run a command's ``main`` on the process's arguments and exit; see :func:`exit_code_of`.

    ``--help`` prints ``usage`` before anything heavy is imported.

    Args:
        main: The command.
        usage: What it does, with examples.
        describe_keys: Returns what ``--help`` says of the keys that further words name, and of all without words.
    """
    wait_asleep()
    arguments = sys.argv[1:]
    words = [argument for argument in arguments if argument not in ("-h", "--help")]
    if len(words) == len(arguments):
        code = exit_code_of(lambda: main(arguments))
        if code > SIGNALLED:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would only disturb the way out
        sys.exit(code)
    if describe_keys is None:
        print(usage.strip())
        sys.exit(0)
    named = [word for word in words if "=" not in word]
    sys.exit(exit_code_of(lambda: print(*([] if named else [usage.strip()]), describe_keys(named), sep="\n")))


def exit_code_of(work: Callable[[], int | None]) -> int:
    """Do a command's work and return its exit code.

    A :class:`FedProxyError` becomes one line on standard error and exit code 2. With ``FEDPROXY_DEBUG=1`` its traceback
    follows, which the line names if something unforeseen is behind it. Ctrl-C, SIGTERM and SIGHUP become one line and
    128 plus the signal's number. Any other exception is a defect and keeps its traceback.
    """
    with handled():
        try:
            return work() or 0
        except BaseException as error:
            hint = str(error) if isinstance(error, KeyboardInterrupt) else ""
            stopped = interruption(error, hint)
            if stopped is not None:
                _say(describe(stopped))
                return exit_code(stopped)
            if isinstance(error, FedProxyError):
                _say_error(error)
                return BAD_INPUT
            if isinstance(error, FileNotFoundError) and not _stands_somewhere():
                _say("error: the working directory was deleted; change into one that is there")
                return BAD_INPUT
            if isinstance(error, BrokenPipeError):  # the reader of our output went away (`| head`)
                sys.stderr.close()
                return 0
            raise


def _stands_somewhere() -> bool:
    """Return whether the working directory is there."""
    try:
        return bool(os.getcwd())
    except OSError:
        return False


def _say_error(error: FedProxyError) -> None:
    line = message_of(error)
    if shows_causes():
        _say(f"error: {line}\n{printable_lines(''.join(traceback.format_exception(error)))}")
        return
    foreign = error.__cause__ is not None and not isinstance(error.__cause__, FedProxyError | OSError)
    _say(f"error: {line}" + (f" ({CAUSE_HINT})" if foreign or LOG_NAME.search(line) else ""))


def _say(line: str) -> None:
    with suppress(OSError):  # the terminal may be gone
        print(line, file=sys.stderr)
