"""What carries messages between the server and the sites: the one seam that a transport implements."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from fedproxy.errors import FedProxyError
from fedproxy.wire.frames import Head, Source

LOST: Mapping[int, str] = {3: "its message was lost", 4: "its reply was lost", 5: "it went away", 8: "its relay died"}
"""Transport errors after which a message is sent once more, in words."""
NO_ANSWER = 2
"""Error of a reply that no relay of ours sent, or that cannot be read."""
TOO_LARGE = 1000
"""Error of a reply that brings more bytes than were asked for."""


class CourierError(FedProxyError):
    """The transport itself does not work."""


@dataclass(frozen=True)
class Node:
    """A site as the transport knows it; the name is the one it was registered with."""

    id: str
    name: str
    online: bool


@dataclass(frozen=True)
class Reply:
    """What came back for a message."""

    state: Literal["none", "reply", "error"]
    head: Head
    """What the site says; empty but for ``state=reply``."""
    code: int = 0
    """The transport's error, see :data:`LOST`."""


NONE_YET = Reply("none", {})
REPLY_LOST = Reply("error", {}, 4)


class Courier(Protocol):
    """Carries messages: a line of JSON, and the bytes of a part of a file."""

    def nodes(self) -> Sequence[Node]:
        """Return the registered sites.

        Raises:
            CourierError: If the transport does not work.
        """
        ...

    def push(self, to: Mapping[str, Head], payload: Source, ttl_s: float) -> Mapping[str, str]:
        """Send a line each to some nodes, and the same bytes to all of them.

        Args:
            to: Lines by node id.
            payload: The bytes.
            ttl_s: Seconds after which message and reply are forgotten.

        Returns:
            The ids of the messages by node id.

        Raises:
            CourierError: If the transport does not work.
        """
        ...

    def pull(self, message: str, payload: Path, *, most: int) -> Reply:
        """Look for the reply to one message; its bytes are written to ``payload``.

        Args:
            message: The message's id.
            payload: File for the bytes; it is made anew.
            most: Most bytes that may come.

        Raises:
            CourierError: If the transport does not work.
        """
        ...

    def close(self) -> None:
        """End the connection."""
        ...
