"""The relay with a stand-in for Flower: one site's nonsense is its own error, and no error's text leaves."""

import importlib
import json
import socket
import sys
import threading
import types
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from fedproxy.wire import flower as wire
from fedproxy.wire.courier import Reply
from fedproxy.wire.flower import RELAY, FlowerCourier
from fedproxy.wire.frames import LONGEST_LINE


@dataclass
class Array:
    dtype: str
    shape: tuple
    stype: str
    data: bytes


class Message(SimpleNamespace):
    def __init__(self, content, node=None, kind=None, **more):
        super().__init__(content=content, node=node, error=None, **more)

    def has_error(self):
        return self.error is not None


class App:
    def main(self):
        return lambda function: function

    query = main


@pytest.fixture
def relay(monkeypatch):
    """Return the relay's modules, imported beside modules that stand for Flower's public ones."""
    names = {
        "flwr": {},
        "flwr.app": {
            "Array": Array, "ArrayRecord": dict, "ConfigRecord": dict, "RecordDict": dict, "Context": object,
            "Message": Message, "MessageType": SimpleNamespace(QUERY="query"),
        },
        "flwr.serverapp": {"Grid": object, "ServerApp": App},
        "flwr.clientapp": {"ClientApp": App},
    }  # fmt: skip
    for name, members in names.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.syspath_prepend(str(RELAY))
    found = {part: importlib.import_module(f"fedproxy_relay.{part}") for part in ("records", "server", "client")}
    yield SimpleNamespace(**found)
    for name in [name for name in sys.modules if name.startswith("fedproxy_relay")]:
        del sys.modules[name]


class Grid:
    """Has one reply for each message."""

    def __init__(self, replies):
        self.replies = replies

    def get_nodes(self):
        return [SimpleNamespace(node_id=1, name="a", status="online")]

    def pull_messages(self, ids):
        found = self.replies[ids[0]]
        if isinstance(found, Exception):
            raise found
        return [Message(found)]


@pytest.fixture
def courier(relay, monkeypatch):
    """Return a courier whose relay serves replies from a table."""

    def make(replies):
        ours, theirs = socket.socketpair()
        stream = theirs.makefile("rwb")
        threading.Thread(target=relay.server._serve, args=(Grid(replies), stream), daemon=True).start()
        mine = ours.makefile("rwb")
        mine.readline()
        monkeypatch.setattr(wire, "_relay_of", lambda hub: (ours, mine))
        return FlowerCourier(RELAY)

    return make


def content(text, data=b"x", stype="fedproxy.file"):
    return {"head": {"json": text}, "file": {"part": Array("uint8", (len(data),), stype, data)}}


FAILED = Reply("error", {}, 2)


@pytest.mark.parametrize(
    "reply",
    [
        content("[" * 100_000 + "]" * 100_000),
        content('{"a":' * 100_000 + "1" + "}" * 100_000),
        content(json.dumps({"a": "x" * LONGEST_LINE})),
        content(json.dumps({"a": "\u00e9" * (LONGEST_LINE // 8)}, ensure_ascii=False)),
        content("not JSON"),
        content("[]"),
        content("1" * 5000),
        content(b"{}"),
        content("{}", stype="numpy"),
        content("{}", data="text"),
        {},
        {"head": {"json": "{}"}, "file": {"part": 3}},
        {"head": 3, "file": 4},
        RecursionError("a message that Flower cannot read"),
        ValueError("a message that Flower cannot read"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_nonsense_of_one_site_is_its_own_error_and_the_others_are_heard(reply, courier, tmp_path):
    line = courier({"bad": reply, "good": content('{"have": 3}', b"abc")})
    assert line.pull("bad", tmp_path / "file", most=10) == FAILED
    assert line.pull("good", tmp_path / "file", most=10) == Reply("reply", {"have": 3})
    assert (tmp_path / "file").read_bytes() == b"abc"
    assert line.nodes()[0].name == "a"
    line.close()


def test_both_ends_take_lines_of_one_length(relay):
    assert relay.records.LONGEST_LINE == LONGEST_LINE


def test_a_number_that_json_does_not_have_reaches_the_run_as_one_sites_head(courier, tmp_path):
    line = courier({"bad": content('{"have": 1e400}'), "good": content("{}")})
    assert line.pull("bad", tmp_path / "file", most=10).head["have"] == float("inf")
    assert line.pull("good", tmp_path / "file", most=10).state == "reply"
    line.close()


def test_more_bytes_than_were_asked_for_are_not_passed_on(courier, tmp_path):
    line = courier({"bad": content("{}", b"x" * 11)})
    assert line.pull("bad", tmp_path / "file", most=10) == Reply("error", {}, 1000)
    line.close()


@pytest.mark.parametrize(
    ("sent", "fails", "word"),
    [
        (content("{}"), TimeoutError("secret"), "late"),
        (content("{}"), ConnectionRefusedError("secret"), "site_down"),
        (content("{}"), EOFError("secret"), "site_down"),
        (content("{}"), RuntimeError("secret"), "not_ours"),
        (content("[" * 100_000), None, "not_ours"),
        (content("3"), None, "not_ours"),
        ({}, None, "not_ours"),
    ],
)
def test_whatever_goes_wrong_at_a_sites_relay_is_one_of_three_words(sent, fails, word, relay, monkeypatch):
    def fail(*_):
        raise fails or AssertionError("it is not to be asked")

    monkeypatch.setattr(relay.client, "_ask", fail)
    message = Message(sent, metadata=SimpleNamespace(created_at=0.0, ttl=1.0))
    answer = relay.client.serve(message, None)
    assert json.loads(answer.content["head"]["json"]) == {"error": word}
