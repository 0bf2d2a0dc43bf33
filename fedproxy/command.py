"""What all commands share: help without heavy imports, errors as one line, exit codes."""

import sys
from collections.abc import Callable, Sequence

from fedproxy.errors import FedProxyError

INTERRUPTED = 130
BAD_INPUT = 2


def run_command(main: Callable[[Sequence[str]], int | None], usage: str) -> None:
    """Run a command's ``main`` on the process's arguments and exit.

    ``--help`` prints ``usage`` before anything heavy is imported. A :class:`FedProxyError` becomes one line on standard
    error and exit code 2, Ctrl-C exit code 130; any other exception is a defect and keeps its traceback.
    """
    arguments = sys.argv[1:]
    if any(argument in ("-h", "--help") for argument in arguments):
        print(usage.strip())
        sys.exit(0)
    try:
        sys.exit(main(arguments) or 0)
    except FedProxyError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    except KeyboardInterrupt as interrupt:
        print(f"interrupted{f'; {interrupt}' if str(interrupt) else ''}", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output went away (`| head`)
        sys.exit(0)
