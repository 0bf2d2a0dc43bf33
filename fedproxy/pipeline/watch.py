"""Serves a run that goes on to one browser on this machine: ``fedproxy report --watch RUN``.

Only the journal, ``server/now.json`` and the lock's file are read, each with a bound, and nothing is written. The
address holds a word that nobody can guess, since other users of the machine reach loopback, too; requests that name
another host are refused, since a page from elsewhere may have its name lead here.
"""

import hmac
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from fedproxy.errors import ConfigError
from fedproxy.files import open_regular
from fedproxy.locks import in_use
from fedproxy.pipeline.folder import RunFolder
from fedproxy.reporting.watched import RELOAD_S, Finished, Now, read_now, read_rounds, watch_page

HOST = "127.0.0.1"
MOST_JOURNAL_BYTES = 8 << 20
"""Bytes at the journal's end that are read; longer runs show their last rounds."""
_MOST_NOW_BYTES = 4 << 20
_LAST_LOOK_S = 3.0 * RELOAD_S
"""Seconds for which a run's last page is still served."""
_HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def watch(run: Path, say: Callable[[str], None]) -> None:
    """Serve a run's page until the run has ended and its last page was there to be seen.

    Args:
        run: The run's folder.
        say: Prints a line.

    Raises:
        ConfigError: If no run goes on there.
    """
    watched = Watched(run)
    if not watched.runs():
        over = run / "report.html"
        hint = f"it has a report: {over}" if over.is_file() else "start the run first"
        raise ConfigError(f"no run goes on in {run}; {hint}")
    with serving(watched) as address:
        say(f"{address}  until the run ends, or Ctrl-C")
        while watched.runs():
            time.sleep(0.5)
        time.sleep(_LAST_LOOK_S)
    say(f"the run in {run} goes on no longer")


class Watched:
    """A run's folder, read again for every page; what is costly is made anew only where the journal changed.

    Args:
        run: The folder.
    """

    def __init__(self, run: Path) -> None:
        self._folder, self._lock = RunFolder(run), threading.Lock()
        self._seen: tuple[int, ...] = ()
        self._finished = Finished.of(())

    def runs(self) -> bool:
        """Return whether a process holds the folder."""
        return in_use(self._folder.root)

    def page(self) -> str:
        """Return the page as it is now."""
        runs = self.runs()  # before the journal is read: a run that has just ended is shown with all its rounds
        with self._lock:
            self._read_journal()
            finished = self._finished
        now = read_now(_tail(self._folder.now, _MOST_NOW_BYTES)) if runs else Now()
        return watch_page(self._folder.root.resolve().name, finished, now, runs=runs, clock=time.time())

    def _read_journal(self) -> None:
        try:
            found = os.stat(self._folder.journal)
        except OSError:
            return
        seen = (found.st_ino, found.st_size, found.st_mtime_ns)
        if seen == self._seen:
            return
        self._seen = seen
        text = _tail(self._folder.journal, MOST_JOURNAL_BYTES)
        lines = text.split(b"\n")
        whole = lines if found.st_size <= MOST_JOURNAL_BYTES else lines[1:]  # the first may be cut off
        self._finished = Finished.of(read_rounds([line for line in whole if line]))


def _tail(path: Path, most: int) -> bytes:
    """Return the last bytes of a regular file; nothing where it cannot be read."""
    try:
        with open_regular(path) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - most))
            return file.read(most)
    except OSError:
        return b""


@contextmanager
def serving(watched: Watched) -> Iterator[str]:
    """Serve a run's page from a thread for the length of a context, and give its address.

    Args:
        watched: The run.
    """
    server = _Server(watched)
    thread = threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True)
    thread.start()
    try:
        yield f"http://{HOST}:{server.server_port}{server.place}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, watched: Watched) -> None:
        super().__init__((HOST, 0), _Handler)
        self.watched, self.place = watched, f"/{secrets.token_urlsafe(16)}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a browser that hangs up before it has read its page; anything else is a defect."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = 10.0
    server_version, sys_version = "fedproxy", ""

    def do_GET(self) -> None:
        """Answer with the page, or say that there is none."""
        host, _, port = self.headers.get("Host", "").rpartition(":")
        if host not in (HOST, "localhost") or port != str(self.server.server_port):
            self._answer(HTTPStatus.MISDIRECTED_REQUEST, "")
        elif hmac.compare_digest(self.path.encode("utf-8", "replace"), self.server.place.encode()):
            self._answer(HTTPStatus.OK, self.server.watched.page())
        else:
            self._answer(HTTPStatus.NOT_FOUND, "")

    def _answer(self, status: HTTPStatus, text: str) -> None:
        body = text.encode("utf-8")
        self.send_response(status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing: the terminal belongs to the command."""
