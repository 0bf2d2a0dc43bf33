"""A frame as a Flower message's content: the line as a text, the payload as one array of bytes that nobody parses."""

import json
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedproxy_relay.frames import LONGEST_LINE

_BYTES = "fedproxy.file"


def packed(head: dict[str, Any], payload: bytes) -> RecordDict:
    """Return a message's content."""
    array = Array("uint8", (len(payload),), _BYTES, payload)
    return RecordDict({"head": ConfigRecord({"json": json.dumps(head)}), "file": ArrayRecord({"part": array})})


def unpacked(content: RecordDict) -> tuple[dict[str, Any], bytes]:
    """Return line and payload of a message's content.

    Raises:
        ValueError: If it is none of ours.
    """
    text, payload = unread(content)
    head = json.loads(text)
    if not isinstance(head, dict):
        raise ValueError("not a message of this app")
    return head, payload


def unread(content: RecordDict) -> tuple[str, bytes]:
    """Return the line of a message's content as the text that it came as, and the payload.

    Raises:
        ValueError: If it is none of ours.
    """
    try:
        text, array = content["head"]["json"], content["file"]["part"]
        kind, payload = array.stype, array.data
    except (KeyError, TypeError, AttributeError):
        raise ValueError("not a message of this app") from None
    if not isinstance(text, str) or kind != _BYTES or not isinstance(payload, bytes):
        raise ValueError("not a message of this app")
    if len(json.dumps(text)) > LONGEST_LINE // 2:
        raise ValueError("its line is too long")
    return text, payload
