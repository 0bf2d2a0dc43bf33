"""The Unix socket between Flower's relay and a site's own process: whatever comes in is bounded and not believed."""

import logging
import os
import pwd
import shutil
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedproxy.errors import ConfigError, one_line
from fedproxy.sites.resident import MOST_PART, Reply
from fedproxy.sites.sockets import socket_folder
from fedproxy.wire.frames import NOTHING, BrokenFrameError, Head, receive, send
from fedproxy.wire.messages import LONGEST_S, refusal

_log = logging.getLogger(__name__)
_SCRATCH = "messages_"
_MOST_AT_ONCE = 4
_AGAIN_S = 1.0
_READ_S = 300.0
"""Seconds that a message may take to come in."""


class Service:
    """Serves one socket.

    Args:
        serve: What answers a message.
        folder: Folder that holds the socket; only this user, and the relay's, can look into it.
        relay_user: User that the relay runs as, where that is another one.

    Raises:
        ConfigError: If the socket cannot be made.
    """

    def __init__(self, serve: Callable[[Head, Path], Reply], folder: Path, relay_user: str = "") -> None:
        self._serve = serve
        self._may = {os.geteuid()}
        for left in folder.parent.glob(f"{_SCRATCH}*"):  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        self._scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=folder.parent))
        self._slots = threading.BoundedSemaphore(_MOST_AT_ONCE)
        self._ended = False
        try:
            place = socket_folder(folder, apart=bool(relay_user))
            self.path = place / "site.sock"
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.bind(str(self.path))
            os.chmod(self.path, 0o600)
            if relay_user:
                self._let_in(pwd.getpwnam(relay_user), place)
            self._socket.listen(_MOST_AT_ONCE)
        except (OSError, KeyError) as error:
            raise ConfigError(f"{folder} cannot be made ({one_line(error)}); free the path") from error
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Take no more messages."""
        self._ended = True
        self._socket.close()
        for folder in (self.path.parent, self._scratch):
            shutil.rmtree(folder, ignore_errors=True)

    def _let_in(self, user: "pwd.struct_passwd", folder: Path) -> None:
        self._may.add(user.pw_uid)
        os.chown(folder, -1, user.pw_gid)
        os.chmod(folder, 0o710)
        os.chown(self.path, user.pw_uid, -1)

    def _accept(self) -> None:
        while not self._ended:
            try:
                opened, _ = self._socket.accept()
            except OSError as error:
                if not self._ended:
                    _log.warning("the relay cannot be let in (%s)", one_line(error))
                    time.sleep(_AGAIN_S)  # too many open files, which ends
                continue
            if not self._slots.acquire(blocking=False):
                opened.close()  # a relay has one message at a time
                continue
            threading.Thread(target=self._answer, args=(opened,), daemon=True).start()

    def _answer(self, opened: socket.socket) -> None:
        payload = self._scratch / f"{threading.get_ident()}"
        try:
            with opened:
                if _user_of(opened) not in self._may:
                    return
                opened.settimeout(_READ_S)
                with opened.makefile("rwb") as stream:
                    try:
                        with _cut_after(opened, _READ_S):
                            head = receive(stream, payload, most=MOST_PART)
                    except BrokenFrameError as error:
                        _log.warning("the relay sent what is no message (%s)", error)
                        send(stream, refusal("not_ours"), NOTHING)
                        return
                    except OSError as error:
                        send(stream, refusal("full" if error.errno else "failed", error.strerror or ""), NOTHING)
                        return
                    opened.settimeout(LONGEST_S)
                    send(stream, *self._serve(head, payload))
        except OSError as error:
            _log.warning("the relay went away (%s)", one_line(error))
        finally:
            with suppress(OSError):
                payload.unlink()
            self._slots.release()


@contextmanager
def _cut_after(opened: socket.socket, seconds: float) -> Iterator[None]:
    """Read no more of a connection after so long, however much comes in until then."""

    def cut() -> None:
        with suppress(OSError):
            opened.shutdown(socket.SHUT_RD)

    timer = threading.Timer(seconds, cut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _user_of(opened: socket.socket) -> int:
    if not hasattr(socket, "SO_PEERCRED"):
        return os.geteuid()  # the socket's permissions alone decide
    credentials = opened.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])
