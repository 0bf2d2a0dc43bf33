"""Frames on a Unix socket: one line of JSON with ``size``, then as many bytes, which go to a file and not into memory.

The relay application has the same few lines of its own, since it imports nothing of FedProxy.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader, BufferedRWPair
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from fedproxy.files import parse_json

LONGEST_LINE = 1 << 23
"""Most bytes of a line: names and seeds of a site's clients, and figures. Of 10,000 clients that is some 2.6 MB."""
MOST_HEAD = LONGEST_LINE // 2
"""Most bytes of a message's line as a text within a line, as the relay hands it on."""
_AT_ONCE = 1 << 20
Head = dict[str, Any]
Stream = BufferedRWPair | BinaryIO


class BrokenFrameError(Exception):
    """The other end is gone, or said what is no frame."""


class Source(Protocol):
    """Bytes that can be read piece by piece."""

    @property
    def size(self) -> int:
        """How many there are."""
        ...

    def pieces(self) -> Iterator[bytes]:
        """Yield them in order, a MiB at a time."""
        ...


@dataclass(frozen=True)
class Bytes:
    """A few bytes in memory."""

    data: bytes = b""

    @property
    def size(self) -> int:
        """How many there are."""
        return len(self.data)

    def pieces(self) -> Iterator[bytes]:
        """Yield them all at once."""
        yield self.data


NOTHING = Bytes()


def send(stream: Stream, head: Mapping[str, Any], payload: Source = NOTHING) -> None:
    """Write one frame.

    Raises:
        OSError: If the other end is gone.
    """
    stream.write(json.dumps({**head, "size": payload.size}, allow_nan=False).encode() + b"\n")
    for piece in payload.pieces():
        stream.write(piece)
    stream.flush()


def receive(stream: Stream | BufferedReader, payload: Path, *, most: int) -> Head:
    """Read one frame: its line is returned, its bytes are written to ``payload``.

    Args:
        stream: The socket.
        payload: File for the bytes; it is made anew.
        most: Most bytes that may follow the line.

    Raises:
        BrokenFrameError: If the other end is gone, or what it said is no frame or has more bytes.
        OSError: If the file cannot be written.
    """
    line = stream.readline(LONGEST_LINE)
    if not line.endswith(b"\n"):
        raise BrokenFrameError("the connection was closed" if len(line) < LONGEST_LINE else "a line is too long")
    try:
        head = parse_json(line, dict)
    except ValueError as error:
        raise BrokenFrameError(f"a line is no message: {error}") from None
    size = head.pop("size", None)
    if type(size) is not int or not 0 <= size <= most:
        raise BrokenFrameError(f"a message brings more than {most} bytes, or does not say how many")
    with open(payload, "wb") as file:
        left = size
        while left:
            piece = stream.read(min(left, _AT_ONCE))
            if not piece:
                raise BrokenFrameError("the connection was closed")
            file.write(piece)
            left -= len(piece)
    return head


def sha256(source: Source) -> str:
    """Return the hash of the bytes."""
    digest = hashlib.sha256()
    for piece in source.pieces():
        digest.update(piece)
    return digest.hexdigest()
