"""What server and sites say to each other: one line of JSON each way, every field checked by who reads it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedproxy.errors import ClientError, ConfigError, one_line
from fedproxy.names import check_name
from fedproxy.wire.frames import Head
from fedproxy.wire.inbox import is_hash

PROTOCOL = 1
"""Version of these messages; both sides must have the same."""
LONGEST_S = 43200.0
"""Longest wait for a site, where a run names none: 12 hours."""
_RUN = re.compile(r"[0-9a-f]{32}")
_MOST_CLIENTS, _MOST_ROWS = 10_000, 10**9
_LATEST = 1e12
"""Seconds since 1970 that no clock shows. They are compared first: a whole number may be too long to be subtracted."""

Refusal = Literal[
    "refused", "busy", "late", "failed", "damaged", "unknown", "version", "changed", "site_down", "not_ours", "full"
]
REFUSALS: Mapping[str, str] = {
    "refused": "its policy does not allow it",
    "busy": "it is busy with another round",
    "late": "it was late",
    "failed": "it failed",
    "damaged": "a part of a file was damaged or out of turn",
    "unknown": "it does not know what was asked for",
    "version": "it speaks another version",
    "changed": "its rows changed since the run began",
    "site_down": "its FedProxy process does not answer; start python -m fedproxy.site up there",
    "not_ours": "its relay got a message that is not FedProxy's",
    "full": "its disk is full",
}
"""All that a site can say of what went wrong, in words."""


@dataclass(frozen=True)
class Setup:
    """How a site is to make its clients: plain values, nothing of the target."""

    proxy: str
    """Hash of the proxy's bundle."""
    proxy_bytes: int
    dtype: Literal["float32", "bfloat16", "float16"]
    trainable: Mapping[str, Any]
    """Name and options of what is trained."""
    max_input_tokens: int
    max_target_tokens: int
    long_rows: Literal["cut", "split", "drop"] = "cut"
    quantization: Literal["none", "8bit", "4bit"] = "none"
    plugins: Sequence[str] = ()
    """Modules that the run's components come from; a site imports those alone that its owner lists."""

    @classmethod
    def parse(cls, said: object) -> "Setup":
        """Return it, checked.

        Raises:
            ClientError: Naming the first field that is missing or wrong.
        """
        values = fields_of(said, cls.__dataclass_fields__, "setup")
        checks = {
            "proxy": is_hash(values["proxy"]),
            "proxy_bytes": is_whole(values["proxy_bytes"]),
            "dtype": values["dtype"] in ("float32", "bfloat16", "float16"),
            "trainable": isinstance(values["trainable"], dict) and isinstance(values["trainable"].get("name"), str),
            "max_input_tokens": is_whole(values["max_input_tokens"], least=1),
            "max_target_tokens": is_whole(values["max_target_tokens"], least=1),
            "long_rows": values["long_rows"] in ("cut", "split", "drop"),
            "quantization": values["quantization"] in ("none", "8bit", "4bit"),
            "plugins": isinstance(values["plugins"], list) and all(isinstance(m, str) for m in values["plugins"]),
        }
        _require(checks, values, "setup")
        return cls(**values)


@dataclass(frozen=True)
class Train:
    """Some clients of a site, to train in a round."""

    round: int
    own: Mapping[str, Mapping[str, Any]]
    """What is each client's alone: its seeds, and what it goes on from (:meth:`fedproxy.protocol.Broadcast.beside`)."""
    files: Mapping[str, int]
    """Which file of the bundle each client starts from, by its place."""
    bundle: str
    """Hash of the bundle with the round's broadcasts."""
    seconds: float
    """How long it may take, counted at the site."""

    @classmethod
    def parse(cls, said: object) -> "Train":
        """Return it, checked; what is each client's own is checked by who uses it.

        Raises:
            ClientError: Naming the first field that is missing or wrong.
        """
        values = fields_of(said, cls.__dataclass_fields__, "task")
        own, files = values["own"], values["files"]
        checks = {
            "round": is_whole(values["round"], least=1),
            "own": _by_client(own) and all(isinstance(part, dict) for part in own.values()),
            "files": isinstance(files, dict) and isinstance(own, dict) and files.keys() == own.keys(),
            "bundle": is_hash(values["bundle"]),
            "seconds": _seconds(values["seconds"]),
        }
        _require(checks, values, "task")
        _require({"files": all(is_whole(place) for place in files.values())}, values, "task")
        return cls(**values)


@dataclass(frozen=True)
class Ask:
    """Messages to some clients of a site outside of rounds."""

    messages: Mapping[str, Mapping[str, Any]]
    """What each is asked, as plain values (:meth:`fedproxy.messages.Message.plain`)."""
    bundle: str | None
    """Hash of the bundle with the tensors that go with it; None where none do."""
    seconds: float
    """How long it may take, counted at the site."""

    @classmethod
    def parse(cls, said: object) -> "Ask":
        """Return it, checked; what is asked is checked by who answers.

        Raises:
            ClientError: Naming the first field that is missing or wrong.
        """
        values = fields_of(said, cls.__dataclass_fields__, "question")
        messages = values["messages"]
        checks = {
            "messages": _by_client(messages) and all(isinstance(part, dict) for part in messages.values()),
            "bundle": values["bundle"] is None or is_hash(values["bundle"]),
            "seconds": _seconds(values["seconds"]),
        }
        _require(checks, values, "question")
        return cls(**values)


@dataclass(frozen=True)
class Greeting:
    """What a site says of itself."""

    clients: Mapping[str, int]
    """Its clients with their numbers of rows."""
    version: str
    """Of FedProxy there."""
    clock: float
    """Seconds since 1970 at the site."""
    have: int
    """Bytes of the proxy that it holds."""
    converse: bool = False
    """Whether there are conversations among its rows, which a chat template frames."""

    @classmethod
    def parse(cls, said: object) -> "Greeting":
        """Return it, checked.

        Raises:
            ClientError: Naming the first field that is missing or wrong.
        """
        values = fields_of(said, cls.__dataclass_fields__, "greeting")
        clients = values["clients"]
        checks = {
            "clients": _by_client(clients)
            and all(is_whole(rows, least=1) and rows <= _MOST_ROWS for rows in clients.values()),
            "version": isinstance(values["version"], str),
            "clock": type(values["clock"]) in (int, float) and abs(values["clock"]) < _LATEST,
            "have": is_whole(values["have"]),
            "converse": isinstance(values["converse"], bool),
        }
        _require(checks, values, "greeting")
        return cls(**{**values, "version": one_line(values["version"], 40)})


def run_id(said: object) -> str:
    """Return a run's name if it is one.

    Raises:
        ClientError: If it is none.
    """
    if not isinstance(said, str) or not _RUN.fullmatch(said):
        raise ClientError("a message does not say of which run it is")
    return said


def refusal(kind: Refusal, why: str = "") -> Head:
    """Return what a site says where it does not do what it was asked.

    Args:
        kind: One of the words.
        why: More, in words of this package's own that quote no row.
    """
    return {"error": kind, **({"why": one_line(why)} if why else {})}


def told(head: Head) -> str | None:
    """Return in words what went wrong at a site, or None where nothing did; what it says is cleaned."""
    kind = head.get("error")
    if kind is None:
        return None
    words = REFUSALS.get(str(kind), "it said something unknown")
    why = head.get("why")
    return f"{words}: {one_line(why)}" if isinstance(why, str) and why else words


def fields_of(said: object, wanted: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Return the fields of a line, if it has these and no others.

    Raises:
        ClientError: Naming the first that is missing or too many.
    """
    if not isinstance(said, dict):
        raise ClientError(f"the {what} must be an object")
    odd = sorted(set(said).symmetric_difference(wanted))
    if odd:
        raise ClientError(f"the {what} {'lacks' if odd[0] in wanted else 'has unknown'} {one_line(repr(odd[0]), 60)}")
    return dict(said)


def _require(checks: Mapping[str, object], values: Mapping[str, Any], what: str) -> None:
    for name, ok in checks.items():
        if not ok:
            raise ClientError(f"the {what}'s {name} cannot be {one_line(repr(values[name]), 80)}")


def _by_client(said: object) -> bool:
    return isinstance(said, dict) and 0 < len(said) <= _MOST_CLIENTS and all(map(_is_name, said))


def _is_name(name: object) -> bool:
    try:
        check_name(name, "client")
    except ConfigError:
        return False
    return True


def is_whole(value: object, *, least: int = 0) -> bool:
    """Return whether a value is a whole number from ``least`` on that has 63 bits."""
    return type(value) is int and least <= value < 1 << 63


def _seconds(value: object) -> bool:
    return type(value) in (int, float) and 0 < value <= LONGEST_S  # type: ignore[operator]
