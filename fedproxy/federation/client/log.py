"""What went wrong at a client: whole in the client's own log, and for the server in words that quote no row."""

import os
import re
import traceback
from pathlib import Path

from fedproxy import errors
from fedproxy.errors import LOG_NAME, ClientError, ConfigError, ModelError, one_line, printable_lines
from fedproxy.files import private_folder
from fedproxy.names import file_stem

_OURS = (ClientError, ConfigError, ModelError)
"""Errors whose text names keys, files and tensors. Those of data quote rows."""
_HEADER = re.compile(r"^round \d+, client .*:$", re.MULTILINE)
_MOST_ENTRY, _MOST_LOG = 1 << 16, 1 << 20
"""Characters that are kept of one failure, and bytes of a log after which it begins anew."""


def told(error: Exception, client_id: str, round_: int, logs: str | None) -> str:
    """Keep an error in its client's log and return what the server is told of it.

    That is its text only where this package wrote it, about something that is no data. Of every other error it is the
    kind alone: its message may quote a row.

    Args:
        error: What the client's work raised.
        client_id: The client.
        round_: Round in which it happened.
        logs: Folder of clients' logs; None keeps none.
    """
    kept = _keep(error, client_id, round_, logs)
    if _is_ours(error):
        return one_line(error)
    kind = type(error).__name__
    if isinstance(error, OSError) and error.errno is not None and error.strerror == os.strerror(error.errno):
        kind += f": {error.strerror}"
    return f"{one_line(kind, 80)}; {kept}"


def shown(log: Path) -> str:
    """Return a log's place in its run folder, for messages: those are kept, and name no folder of this machine."""
    return "/".join(log.parts[-3:])


def last_entry(line: str, root: Path) -> str:
    """Return the latest failure in the log that a line names, in printable characters; nothing where there is none.

    Args:
        line: What was told of a client, or of a worker.
        root: Folder of the run.
    """
    named = LOG_NAME.search(line)
    if named is None:
        return ""
    try:
        with open(root / "checkpoints" / "logs" / Path(named[0]).name, "rb", opener=_readable) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _MOST_ENTRY))
            text = file.read(_MOST_ENTRY).decode("utf-8", "replace")
    except OSError:
        return ""
    entries = [found.start() for found in _HEADER.finditer(text)]
    entry = text[entries[-1] if entries else 0 :].rstrip()
    return printable_lines(entry)


def _is_ours(error: Exception) -> bool:
    if type(error).__module__ != errors.__name__ or not isinstance(error, _OURS):
        return False
    where = error.__traceback__
    while where is not None and where.tb_next is not None:
        where = where.tb_next
    return where is not None and str(where.tb_frame.f_globals.get("__name__", "")).startswith("fedproxy.")


def _keep(error: Exception, client_id: str, round_: int, logs: str | None) -> str:
    """Add an error to a client's log and return where its details are."""
    if logs is None:
        return "no log is kept"
    path = Path(logs) / f"{file_stem(client_id)}.log"
    try:
        text = "".join(traceback.format_exception(error))
    except Exception:  # a foreign object may fail at anything
        text = type(error).__name__
    entry = f"round {round_}, client {client_id!r}:\n{text[:_MOST_ENTRY]}\n"
    try:
        private_folder(path.parent)
        begins = path.exists() and path.stat().st_size > _MOST_LOG
        with open(path, "wb" if begins else "ab", opener=_private) as file:
            file.write(entry.encode("utf-8", "replace"))
    except OSError as failed:
        return f"its log cannot be written ({failed.strerror})"
    return f"details in the client's log {shown(path)}"


def _readable(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
