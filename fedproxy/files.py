"""Files as every part of FedProxy reads and writes them: JSON of a known type, whole or not at all, never a pipe.

JSON is written as the standard has it: no NaN, no infinity.
"""

import gzip
import hashlib
import json
import math
import os
import secrets
import shutil
import stat
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar

from fedproxy.errors import CheckpointError, FedProxyError, one_line

T = TypeVar("T")
MOST_JSON_BYTES = 1 << 28
"""Largest file of JSON that is read whole: 256 MiB, far above what a run writes."""
_KINDS = {dict: "an object", list: "a list", str: "a text", int: "a whole number", float: "a number"}


def plain(value: Any) -> Any:
    """Return ``value`` as JSON types: tensors and arrays become lists, NaN and infinities become None.

    Raises:
        TypeError: If a value has no JSON form.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if hasattr(value, "tolist"):  # torch tensors and NumPy arrays and scalars
        return plain(value.tolist())
    if isinstance(value, os.PathLike):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def write_text(path: str | Path, text: str, *, private: bool = False) -> Path:
    """Write ``text`` in UTF-8 to ``path``; see :func:`write_bytes`."""
    return write_bytes(path, text.encode("utf-8"), private=private)


def write_bytes(path: str | Path, data: bytes, *, private: bool = False) -> Path:
    """Write ``data`` to ``path`` through a temporary file and a rename, so that readers never see half of it.

    A file that holds these bytes already is left as it is.

    Args:
        path: The file; its folder is made if it is missing.
        data: Its content.
        private: Whether only the owner may read it.

    Raises:
        CheckpointError: If the folder cannot be made or written; what was there before stays.
    """
    path = Path(path)
    try:
        if _holds(path, data):
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / f".{path.name[:64]}.{secrets.token_hex(4)}"
        # Not by mkstemp: its files are the owner's alone, and to ask for the umask is to change it, for all threads.
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600 if private else 0o666)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path} ({error.strerror or error}); free the path or choose another output_dir"
        ) from error
    return path


def write_json(path: str | Path, value: Any, *, private: bool = False) -> Path:
    """Write ``value`` as indented JSON; see :func:`plain` and :func:`write_text`."""
    text = json.dumps(plain(value), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    return write_text(path, text, private=private)


def parse_json(text: str | bytes, kind: type[T], *, unique_keys: bool = False) -> T:
    """Return the value of a JSON text, of the wanted type.

    Args:
        text: The text, in UTF-8 where it comes as bytes.
        kind: dict, list, str, int or float.
        unique_keys: Refuse an object that has a key twice, where JSON itself keeps the last one.

    Raises:
        ValueError: In one line, if the text is not JSON that can be read (too deep, a number of too many digits, not
            UTF-8, a key twice), or holds another type.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique if unique_keys else None, parse_int=_whole)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text (byte {error.start})") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}" if "\n" in error.doc.rstrip() else f"column {error.pos + 1}"
        raise ValueError(f"it is not valid JSON ({place}: {error.msg})") from None
    except ValueError as error:  # a number of more digits than Python reads
        raise ValueError(f"it cannot be read ({one_line(error)})") from None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"it must hold {_KINDS.get(kind, kind.__name__)}, got {type(value).__name__}")
    return value


def read_json(
    path: str | Path,
    kind: type[T],
    *,
    error: type[FedProxyError] = CheckpointError,
    remedy: str = "use overwrite=true or another output_dir",
) -> T:
    """Return the content of a JSON file, of the wanted type.

    Args:
        path: The file.
        kind: dict, list, str, int or float.
        error: What to raise.
        remedy: The way out, with which the line ends.

    Raises:
        FedProxyError: ``error``, in one line, if the file is missing, not a regular file, larger than
            :data:`MOST_JSON_BYTES`, not JSON, or holds another type.
    """
    try:
        data = read_whole(path)
        return parse_json(_unpacked(data) if str(path).endswith(".gz") else data, kind)
    except (OSError, ValueError) as found:
        reason = found.strerror if isinstance(found, OSError) and found.strerror else one_line(found)
        raise error(f"{path} cannot be read: {reason}; {remedy}") from found


def open_regular(path: str | Path, *, follow: bool = False) -> BufferedReader:
    """Open a regular file for reading; a pipe, a device or a folder is refused and never waited for.

    Args:
        path: The file.
        follow: Whether the last part of the path may be a symbolic link.

    Raises:
        OSError: If it cannot be opened or is not a regular file.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    handle = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(None, "it is not a regular file", str(path))
    return os.fdopen(handle, "rb")


def read_whole(path: str | Path, *, most: int = MOST_JSON_BYTES) -> bytes:
    """Return the bytes of a regular file that is to be held in memory; a link is followed.

    Args:
        path: The file.
        most: Most bytes that it may have.

    Raises:
        OSError: If it cannot be opened, is not a regular file, or has more bytes.
    """
    with open_regular(path, follow=True) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise OSError(None, f"it has {size} bytes, {most} are the most that is read", str(path))
        return file.read(most)


def at_home(path: str | Path) -> Path:
    """Return a path with the user's home folder for a leading ``~``; that of an unknown user stays as it is written."""
    return Path(os.path.expanduser(path))


def file_sha256(path: str | Path) -> str:
    """Return the hash of a regular file's bytes.

    Raises:
        OSError: If it cannot be read.
    """
    with open_regular(path, follow=True) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def private_folder(path: str | Path) -> Path:
    """Make a folder, and those above it, that only its owner can look into; one that is there is closed to others.

    Raises:
        OSError: If it cannot be made.
    """
    path = Path(path)
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        path.chmod(0o700)
    return path


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give an empty folder to fill, which takes the place of ``folder`` when the context ends without an error.

    Until then, and after an error, what was there stays; a kill between the two renames is repaired by the next call.

    Raises:
        OSError: If it cannot be made or renamed.
    """
    part, old = (folder.with_name(f".{folder.name}.{word}") for word in ("part", "old"))
    if old.is_dir() and not folder.exists():
        old.rename(folder)
    for left in (part, old):
        shutil.rmtree(left, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        if folder.exists():
            folder.rename(old)
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        if old.is_dir() and not folder.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def flush(paths: Iterable[Path]) -> None:
    """Bring files, or folders' lists of files, to the disk itself."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def packed(text: str) -> bytes:
    """Return a text in UTF-8, packed by gzip: equal texts give equal bytes."""
    return gzip.compress(text.encode("utf-8"), mtime=0)


def _unpacked(data: bytes) -> bytes:
    unpacking = zlib.decompressobj(zlib.MAX_WBITS | 16)
    try:
        whole = unpacking.decompress(data, MOST_JSON_BYTES)
    except zlib.error as error:
        raise ValueError(f"it is not packed by gzip ({one_line(error, 80)})") from error
    if not unpacking.eof:
        more = unpacking.unconsumed_tail
        raise ValueError(f"it unpacks to more than {MOST_JSON_BYTES} bytes" if more else "the gzip file is cut off")
    return whole


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for name, value in pairs:
        if name in content:
            raise ValueError(f"{one_line(name, 40)!r} stands twice in one object")
        content[name] = value
    return content


def _whole(digits: str) -> int:
    number = int(digits)
    if abs(number) > sys.float_info.max:
        raise ValueError(f"a number has {len(digits)} digits")
    return number


def _holds(path: Path, data: bytes) -> bool:
    try:
        with open_regular(path) as file:
            return os.fstat(file.fileno()).st_size == len(data) and file.read() == data
    except OSError:
        return False
