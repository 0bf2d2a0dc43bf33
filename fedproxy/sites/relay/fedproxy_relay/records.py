"""A frame as a Flower message's content: the line as a text, the payload as one array of bytes that nobody parses."""

import json
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

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
    try:
        head, array = json.loads(content["head"]["json"]), content["file"]["part"]
    except (KeyError, TypeError, ValueError):
        raise ValueError("not a message of this app") from None
    if not isinstance(head, dict) or array.stype != _BYTES:
        raise ValueError("not a message of this app")
    return head, array.data
