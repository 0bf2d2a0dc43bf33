"""Several files as one: a table of names and sizes, then the files one after another. Nothing is copied to make one."""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BufferedReader
from pathlib import Path

from fedproxy.errors import ClientError
from fedproxy.files import open_regular, parse_json

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
_MOST_TABLE, _MOST_FILES, _AT_ONCE = 1 << 20, 10_000, 1 << 20
"""Files: one for each of the most clients that a site may have (:mod:`fedproxy.wire.messages`)."""
_PREFIX = 8


@dataclass(frozen=True)
class Bundle:
    """Files that travel together, read where they lie.

    Args:
        files: Names in the bundle to paths.
    """

    files: Mapping[str, Path]

    @classmethod
    def of_folder(cls, folder: Path) -> "Bundle":
        """Return the bundle of a folder's files."""
        return cls({path.name: path for path in sorted(folder.iterdir()) if path.is_file()})

    @cached_property
    def _head(self) -> bytes:
        table = json.dumps([[name, path.stat().st_size] for name, path in self.files.items()]).encode()
        return len(table).to_bytes(_PREFIX, "little") + table

    @cached_property
    def size(self) -> int:
        """Bytes of the bundle."""
        return len(self._head) + sum(path.stat().st_size for path in self.files.values())

    @cached_property
    def sha256(self) -> str:
        """Hash of the bundle: its name on both sides."""
        digest = hashlib.sha256()
        for piece in self.read(0, self.size):
            digest.update(piece)
        return digest.hexdigest()

    def read(self, offset: int, length: int) -> Iterator[bytes]:
        """Yield ``length`` bytes from ``offset`` on, a MiB at a time.

        Raises:
            OSError: If a file is gone, or shorter than it was.
        """
        yield self._head[offset : offset + length]
        start, end = len(self._head), offset + length
        for path in self.files.values():
            size = path.stat().st_size
            first, last = max(offset, start), min(end, start + size)
            if first < last:
                yield from _piecewise(path, first - start, last - first)
            start += size

    def part(self, offset: int, length: int) -> "Part":
        """Return a part of the bundle, cut where the bundle ends."""
        return Part(self, offset, max(0, min(length, self.size - offset)))


@dataclass(frozen=True)
class Part:
    """Bytes of a bundle that travel in one message."""

    bundle: Bundle
    offset: int
    size: int

    def pieces(self) -> Iterator[bytes]:
        """Yield them in order."""
        return self.bundle.read(self.offset, self.size)


def unpack(bundle: Path, folder: Path, *, names: Sequence[str] | None = None) -> list[Path]:
    """Write a bundle's files into an empty folder; nothing of it is trusted.

    Args:
        bundle: The file that was received.
        folder: Where its files go; made if missing.
        names: The names that it must hold, in this order; None takes any plain ones.

    Raises:
        ClientError: If it is not a bundle, or names what is not a plain file name, or other files.
        OSError: If a file cannot be written.
    """
    with open_regular(bundle) as source:
        table = _table(source.read(_PREFIX), source, os.fstat(source.fileno()).st_size)
        if names is not None and [name for name, _ in table] != list(names):
            raise ClientError("what was sent holds other files than those that were asked for; send it again")
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for name, size in table:
            with open(folder / name, "xb") as file:
                for length in _lengths(size):
                    file.write(source.read(length))
            paths.append(folder / name)
    return paths


def _table(prefix: bytes, source: BufferedReader, total: int) -> list[tuple[str, int]]:
    length = int.from_bytes(prefix, "little")
    if len(prefix) != _PREFIX or length > min(_MOST_TABLE, total - _PREFIX):
        raise ClientError("what was sent is no bundle of files; send it again")
    try:
        found = parse_json(source.read(length), list)
        table = [(str(name), size) for name, size in found]
    except (ValueError, TypeError) as error:
        raise ClientError("what was sent has no table of files that can be read; send it again") from error
    good = all(_NAME.fullmatch(name) and type(size) is int and size >= 0 for name, size in table)
    whole = good and _PREFIX + length + sum(size for _, size in table) == total
    if not whole or len(table) > _MOST_FILES or len({name.lower() for name, _ in table}) < len(table):
        raise ClientError("what was sent has a table that names no plain files, or not its own sizes; send it again")
    return table


def _piecewise(path: Path, start: int, length: int) -> Iterator[bytes]:
    with open(path, "rb") as file:
        file.seek(start)
        for wanted in _lengths(length):
            piece = file.read(wanted)
            if len(piece) != wanted:
                raise OSError(None, "it became shorter while it was read", str(path))
            yield piece


def _lengths(total: int) -> Iterator[int]:
    for done in range(0, total, _AT_ONCE):
        yield min(_AT_ONCE, total - done)
