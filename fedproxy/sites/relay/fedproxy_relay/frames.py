"""Frames on a Unix socket: one line of JSON, and as many bytes as it says. The other end has the same few lines."""

import json
from typing import Any, BinaryIO

LONGEST_LINE = 1 << 23
"""Most bytes of a line."""
MOST_BYTES = 1 << 30
"""Most bytes of a payload."""


def send(stream: BinaryIO, head: dict[str, Any], payload: bytes = b"") -> None:
    """Write one frame."""
    stream.write(json.dumps({**head, "size": len(payload)}).encode() + b"\n")
    stream.write(payload)
    stream.flush()


def receive(stream: BinaryIO) -> tuple[dict[str, Any], bytes]:
    """Read one frame.

    Raises:
        EOFError: If the other end is gone.
        ValueError: If it is no frame.
    """
    line = stream.readline(LONGEST_LINE)
    if not line.endswith(b"\n"):
        raise EOFError
    head = json.loads(line)
    size = head.pop("size", None) if isinstance(head, dict) else None
    if type(size) is not int or not 0 <= size <= MOST_BYTES:
        raise ValueError
    payload = stream.read(size)
    if len(payload) != size:
        raise EOFError
    return head, payload
