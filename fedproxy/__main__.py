"""`fedproxy COMMAND`: every command by one name; `python -m fedproxy.COMMAND` is the same."""

import runpy
import sys

from fedproxy import __version__
from fedproxy.command import BAD_INPUT, COMMANDS
from fedproxy.errors import nearest, one_line


def usage() -> str:
    """Return the help text."""
    lines = "\n".join(f"  {name:12}{words}" for name, words in COMMANDS.items())
    return f"usage: fedproxy COMMAND ... | --version\n\n{lines}\n\nfedproxy COMMAND --help says more."


def main() -> None:
    """Run the command that the first argument names, with the others."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        sys.exit(0 if words else BAD_INPUT)
    if words[0] in ("-V", "--version"):
        print(f"fedproxy {__version__}")
        sys.exit(0)
    if words[0] not in COMMANDS:
        print(f"error: {one_line(words[0], 40)!r} is not a command{nearest(words[0], COMMANDS)}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    sys.argv[:2] = [f"fedproxy {words[0]}"]
    runpy.run_module(f"fedproxy.{words[0]}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
