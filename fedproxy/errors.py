"""Errors that a user, a client or a file can cause: each is one line that names the key, the rule and the way out."""

import difflib
import os
import re
from collections.abc import Iterable

LONGEST_LINE = 300
"""Most characters of a text that somebody else wrote, wherever it is shown or kept."""
LONGEST_MESSAGE = 1400
"""Most characters of an error's line."""
_LONG_WORD = re.compile(rf"\S{{{LONGEST_LINE + 1},}}")
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])|\x9b[0-?]*[ -/]*[@-~]")
"""Terminal commands: colours, titles, links."""


class FedProxyError(Exception):
    """Base of every error with a way out; commands print it as one line and end with exit code 2."""


class ConfigError(FedProxyError):
    """A recipe or a command line asks for something that does not exist, does not fit or cannot be done."""


class DataError(FedProxyError):
    """A data file, a data set or one of its rows cannot be used."""


class AssetError(FedProxyError):
    """An asset cannot be fetched, verified or converted."""


class ModelError(FedProxyError):
    """A model cannot be loaded, compressed or fused."""


class ClientError(FedProxyError):
    """A client's update or training is at fault."""


class CheckpointError(FedProxyError):
    """A run folder or a checkpoint cannot be written, read or resumed."""


class EvaluationError(FedProxyError):
    """An evaluation task or setting cannot be used."""


def shows_causes() -> bool:
    """Return whether whole tracebacks are to be shown below errors: ``FEDPROXY_DEBUG=1`` in the environment."""
    return os.environ.get("FEDPROXY_DEBUG") == "1"


LOG_NAME = re.compile(r"\S+/logs/[\w.-]+\.log\b")
"""How lines name the log of a client or of a worker, which has the traceback."""
CAUSE_HINT = "FEDPROXY_DEBUG=1 shows the traceback"
"""What an error ends with whose line cannot say what happened."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the hint ``; did you mean X?`` for the known name closest to ``name``, or the list of known names."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(names)}" if names else ""


def one_line(text: object, limit: int = LONGEST_LINE) -> str:
    """Return an error's message, or any other text of foreign origin, fit to be shown and kept.

    It is one line of printable characters: control characters, escape sequences and marks that change the direction
    of writing become blanks, blanks in a row become one, and what is longer than ``limit`` is cut. This is the one
    border that text of clients, files and libraries passes.

    Args:
        text: An exception, whose type stands in where it has no message, or anything with a ``str``.
        limit: Most characters.
    """
    try:
        whole = str(text)[: 64 * limit]
    except Exception:  # a foreign object may fail at anything
        whole = ""
    clean = "".join(character if character.isprintable() else " " for character in _ESCAPES.sub(" ", whole))
    line = " ".join(clean.split()) or type(text).__name__
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def message_of(error: BaseException) -> str:
    """Return an error's line as it is shown and kept, whatever a user, a client or a file put into it.

    It is printable. What is too long, a word or the line, is cut in its middle: the key stands in front, the way out at
    the end.
    """
    line = _LONG_WORD.sub(lambda word: _shortened(word[0], LONGEST_LINE), one_line(error, 1000 * LONGEST_MESSAGE))
    return _shortened(line, LONGEST_MESSAGE)


def _shortened(text: str, limit: int) -> str:
    half = (limit - 3) // 2
    return text if len(text) <= limit else f"{text[:half]}...{text[-half:]}"


def printable_lines(text: str) -> str:
    """Return a text of several lines, such as a traceback, each as :func:`one_line` shows it and indented as it was."""
    lines = ((line, len(line) - len(line.lstrip(" "))) for line in text.splitlines())
    return "\n".join(" " * blanks + one_line(line, 1000) if line.strip() else "" for line, blanks in lines)


def first_line(error: object) -> str:
    """Return the first line of a library's error that says something, as :func:`one_line` shows it.

    A line that ends with a colon only announces the next one.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if not line.endswith(":")] or lines
    return one_line(said[0]) if said else type(error).__name__
