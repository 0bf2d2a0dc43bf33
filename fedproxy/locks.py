"""One process at a time writes into a folder: a lock that names its holder and is free when the holder dies."""

import errno
import fcntl
import json
import os
import socket
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fedproxy.errors import CheckpointError, ConfigError, one_line
from fedproxy.files import open_regular, parse_json

LOCK_FILE = ".fedproxy.lock"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_LONGEST = 4096
_TRIES = 1000  # of opening a file that others make and remove meanwhile


@contextmanager
def locked(folder: str | Path, key: str = "output_dir") -> Iterator[None]:
    """Hold a folder for the length of the context; it is made if it is missing, and removed again if it stays empty.

    The kernel holds the lock (``flock``), so it is free as soon as the process ends, however it ends. The file names
    process and machine. Where the file names another machine, nobody can say whether that process still runs (a node
    that was lost, a network file system that keeps locks to each machine): then the user has to delete the file.

    Args:
        folder: The folder.
        key: The key that names it, for errors.

    Raises:
        ConfigError: If another process holds it; the line names process and machine.
        CheckpointError: If the folder or the lock cannot be written.
    """
    folder = Path(folder)
    is_new = not os.path.isdir(folder)
    path = folder / LOCK_FILE
    try:
        handle, held = _open(path)
    except (OSError, ValueError) as error:  # a zero byte is a ValueError
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{key} {one_line(folder)} cannot be written ({reason}); choose another {key}") from error
    try:
        _check_holder(_holder(handle), path, key, held)
        _sign(handle, path)
    except BaseException:
        os.close(handle)
        raise
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # while it is held: who waits for this file sees that it is gone and makes a new one
        os.close(handle)
        if is_new:
            with suppress(OSError):
                folder.rmdir()


def in_use(folder: str | Path) -> bool:
    """Return whether a process holds a folder, as far as its lock's file tells; the lock itself is not touched.

    Of a process on another machine, or in another container, nobody here can say whether it runs: it counts as alive.
    """
    try:
        with open_regular(Path(folder) / LOCK_FILE) as file:
            holder = parse_json(file.read(_LONGEST), dict)
    except (OSError, ValueError):
        return False
    return holder.get("host") != socket.gethostname() or holder.get("pid") == os.getpid() or _alive(holder)


def _open(path: Path) -> tuple[int, bool | None]:
    """Return a handle of the lock's file, and whether it is locked now: None where the file system has no locks."""
    for _ in range(_TRIES):
        with suppress(FileNotFoundError, FileExistsError):  # the last holder is just removing what it had made
            return _try_open(path)
    return _try_open(path)


def _try_open(path: Path) -> tuple[int, bool | None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    try:
        held = _flock(handle)
        if held is not False and not os.path.samestat(os.fstat(handle), os.stat(path)):
            raise FileNotFoundError(errno.ENOENT, "it is removed and made again all the time")
    except BaseException:
        os.close(handle)
        raise
    return handle, held


def _flock(handle: int) -> bool | None:
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        raise OSError(errno.EINVAL, f"{LOCK_FILE} is not a regular file")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None


def _check_holder(holder: Mapping[str, Any], path: Path, key: str, held: bool | None) -> None:
    pid, host = one_line(holder.get("pid", "unknown"), 20), one_line(holder.get("host", "this machine"), 100)
    where, who = f"{key} {path.parent}", f"process {pid} on {host}"
    if held is False or (held is None and holder and _here(holder) and _alive(holder)):
        raise ConfigError(f"{where} is in use by {who}; wait for it, or choose another {key}")
    if holder and not _here(holder):
        raise ConfigError(f"{where} is locked by {who}; if that process has ended, delete {path}")


def _sign(handle: int, path: Path) -> None:
    own = {"pid": os.getpid(), "host": socket.gethostname(), "boot": _boot()}
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(own).encode(), 0)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written ({error.strerror}); free disk space") from error


def _holder(handle: int) -> Mapping[str, Any]:
    """Return what the file says of its holder; nothing where it is new, or its holder is about to write."""
    try:
        return parse_json(os.pread(handle, _LONGEST, 0), dict)
    except ValueError:
        return {}


def _here(holder: Mapping[str, Any]) -> bool:
    """Return whether the holder is, or was, a process of this machine, in whatever container."""
    return holder.get("host") == socket.gethostname() or (bool(_boot()) and holder.get("boot") == _boot())


def _alive(holder: Mapping[str, Any]) -> bool:
    """Return whether the holder's process runs; only asked where the file system has no locks."""
    if holder.get("boot") != _boot() or holder.get("pid") == os.getpid():
        return False
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, KeyError, ValueError, TypeError, OverflowError):
        return True
    return True


def _boot() -> str:
    """Return what names this start of this machine's kernel; containers on it share it."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""
