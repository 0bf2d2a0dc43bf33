"""Asking sites: who is away is given up in time, a lost message is sent again, a broken line is opened anew."""

import hashlib
import json
import time
from collections import Counter

import pytest

from fedproxy.errors import ClientError
from fedproxy.wire import link as wire
from fedproxy.wire.bundle import Bundle
from fedproxy.wire.courier import CourierError
from fedproxy.wire.frames import NOTHING, Bytes
from fedproxy.wire.inbox import Inbox, Piece
from fedproxy.wire.link import Link, Terms
from fedproxy.wire.messages import _MOST_CLIENTS

from .fake_courier import FakeCourier


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, seconds in {"_LOOK_S": 0.0, "_PAUSE_S": 0.0, "_AGAIN_S": 0.0, "MARGIN_S": 0.3}.items():
        monkeypatch.setattr(wire, name, seconds)


def echo(head, payload):
    return {"got": payload.stat().st_size}, NOTHING


def opened(tmp_path, sites, **terms):
    courier = FakeCourier(sites, tmp_path / "line")
    return courier, Link(lambda: courier, Terms(**{"wait_s": 0.3, **terms}), tmp_path / "link")


def asked(link, *sites, seconds=0.2, **more):
    answers = link.ask({site: {"kind": "x"} for site in sites}, seconds, margin_s=0.2, **more)
    return {answer.site: answer.lost or answer.head for answer in answers}


def test_sites_answer_and_shared_bytes_go_up_once(tmp_path):
    courier, link = opened(tmp_path, {"a": echo, "b": echo})
    payload = Bytes(b"abc")
    assert asked(link, "a", "b", payloads={"a": payload, "b": payload}) == {"a": {"got": 3}, "b": {"got": 3}}
    assert courier.bytes["pushed"] == 3


def test_lines_go_together_as_far_as_the_relay_takes_them_and_one_too_long_costs_its_site_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(wire, "MOST_HEAD", 1000)
    courier, link = opened(tmp_path, dict.fromkeys("abcdef", echo))
    pushed, push = [], courier.push
    courier.push = lambda to, *more: pushed.append(len(json.dumps({"to": list(to.values())}))) or push(to, *more)
    lines = {site: {"kind": "x", "own": site * (1000 if site == "d" else 200)} for site in "abcdef"}
    found = {answer.site: answer.lost or answer.head for answer in link.ask(lines, 0.2, margin_s=0.2)}
    assert found.pop("d").startswith(
        "what it is to be told of its clients has 1034 bytes, 1000 are the most; let fewer"
    )
    assert found == {site: {"got": 0} for site in "abcef"}
    assert 1 < len(pushed) < 5
    assert max(pushed) < 1000


def test_what_a_site_of_most_clients_is_told_of_them_fits_into_a_line():
    seeds = {"batches": 2**62, "dropout": [2**62], "parts": 2**62}
    own = {f"client {k:05d}": {"seeds": seeds, "kept": {"round": 100, "seal": "ab" * 32}} for k in range(_MOST_CLIENTS)}
    task = {"round": 100, "own": own, "files": dict.fromkeys(own, 0), "bundle": "ab" * 32, "seconds": 600.0}
    assert wire._size_of({"kind": "train", "run": "ab" * 16, "part": 1 << 27, "task": task}) < wire.MOST_HEAD


def test_a_site_that_is_not_named_receives_nothing(tmp_path):
    courier, link = opened(tmp_path, {"a": echo, "b": echo})
    asked(link, "a")
    assert {name for name, *_ in courier.sent} == {"a"}


def test_a_site_that_stays_away_is_given_up_and_the_others_are_not_held_up(tmp_path):
    courier, link = opened(tmp_path, {"a": echo, "b": echo})
    courier.offline.add("b")
    began = time.monotonic()
    found = asked(link, "a", "b", "nobody")
    assert found["a"] == {"got": 0}
    assert found["b"] == found["nobody"] == "it was not online within engine.wait_s of 0.3 s"
    assert time.monotonic() - began < 5


def test_a_site_that_never_answers_is_given_up(tmp_path):
    courier, link = opened(tmp_path, {"a": echo})
    courier.silent.add("a")
    assert asked(link, "a") == {"a": "it did not answer in time"}


def test_a_lost_message_is_sent_again_as_often_as_the_terms_say(tmp_path):
    courier, link = opened(tmp_path, {"a": echo, "b": echo}, attempts=2)
    courier.errors = {"a": [5], "b": [8, 5]}
    assert asked(link, "a", "b", seconds=5) == {"a": {"got": 0}, "b": "it went away (2 tries)"}


def test_what_is_lost_without_a_word_shows_by_a_ping_and_is_sent_again(tmp_path):
    courier, link = opened(tmp_path, {"a": echo, "b": echo}, attempts=2, ping_s=0.05)
    courier.swallowed.update(a=1, b=2)
    began = time.monotonic()
    assert asked(link, "a", "b", seconds=30) == {"a": {"got": 0}, "b": "its reply was lost (2 tries)"}
    assert time.monotonic() - began < 10
    kinds = Counter(kind for name, kind, _ in courier.sent if name == "a")
    assert kinds["x"] == 2
    assert kinds["ping"] >= 1


def test_a_site_that_is_at_work_answers_no_ping_and_is_sent_nothing_twice(tmp_path):
    courier, link = opened(tmp_path, {"a": echo}, ping_s=0.05)
    courier.silent.add("a")
    assert asked(link, "a", seconds=2.0) == {"a": "it did not answer in time"}
    kinds = Counter(kind for _, kind, _ in courier.sent)
    assert kinds["x"] == 1
    assert 1 <= kinds["ping"] <= 3  # each after four times as long


def test_an_error_that_nobody_knows_is_named_and_not_tried_again(tmp_path):
    courier, link = opened(tmp_path, {"a": echo})
    courier.errors = {"a": [2]}
    assert asked(link, "a") == {"a": "its relay failed"}


def test_a_site_whose_own_process_is_down_is_asked_again(tmp_path):
    answers = [{"error": "site_down"}, {"error": "busy"}, {"ok": 1}]
    _, link = opened(tmp_path, {"a": lambda head, payload: (answers.pop(0), NOTHING)}, wait_s=10)
    assert asked(link, "a", seconds=10) == {"a": {"ok": 1}}


def test_a_site_whose_own_process_stays_down_is_given_up_with_the_way_out(tmp_path):
    _, link = opened(tmp_path, {"a": lambda head, payload: ({"error": "site_down"}, NOTHING)})
    assert "start python -m fedproxy.site up there" in asked(link, "a")["a"]


def test_a_line_that_breaks_is_opened_again_and_nothing_is_lost(tmp_path):
    courier, link = opened(tmp_path, {"a": echo, "b": echo}, wait_s=30)
    asked(link, "a")
    courier.breaks = 2
    assert asked(link, "a", "b", seconds=10) == {"a": {"got": 0}, "b": {"got": 0}}
    assert courier.closed


def test_a_line_that_cannot_be_opened_again_ends_the_run(tmp_path):
    courier, link = opened(tmp_path, {"a": echo})
    courier.breaks = 10**9
    with pytest.raises(CourierError, match="the line is cut"):
        asked(link, "a")


def test_a_file_reaches_all_sites_in_parts_that_each_go_up_once(tmp_path):
    (tmp_path / "file").write_bytes(bytes(range(256)) * 40)
    bundle = Bundle({"f": tmp_path / "file"})
    inboxes = {name: Inbox(tmp_path / name) for name in "abc"}

    def taking(inbox):
        return lambda head, payload: ({"have": inbox.add(Piece.parse(head["piece"], most=1 << 20), payload)}, NOTHING)

    courier, link = opened(tmp_path, {name: taking(inbox) for name, inbox in inboxes.items()}, part_bytes=1000)
    assert link.send("0" * 32, bundle, dict.fromkeys("ab", 0), all_of_it=True) == {}
    assert courier.bytes["pushed"] == bundle.size
    assert courier.largest == 1000
    whole = b"".join(bundle.read(0, bundle.size))
    assert all(inboxes[name].whole(bundle.sha256).read_bytes() == whole for name in "ab")
    assert inboxes["c"].have(bundle.sha256) == 0
    pushed = courier.bytes["pushed"]
    have = {name: inbox.have(bundle.sha256) for name, inbox in inboxes.items()}
    link.send("0" * 32, bundle, {name: have[name] for name in "ab"}, all_of_it=True)
    assert courier.bytes["pushed"] == pushed  # a second run sends none of it


def test_a_transfer_goes_on_after_parts_were_lost(tmp_path):
    (tmp_path / "file").write_bytes(bytes(range(256)) * 40)
    bundle, inbox = Bundle({"f": tmp_path / "file"}), Inbox(tmp_path / "a")

    def take(head, payload):
        return {"have": inbox.add(Piece.parse(head["piece"], most=1 << 20), payload)}, NOTHING

    courier, link = opened(tmp_path, {"a": take}, part_bytes=1000, attempts=4, wait_s=10)
    courier.errors = {"a": ["after", 5, 8]}
    assert link.send("0" * 32, bundle, {"a": 0}, all_of_it=True) == {}
    assert inbox.whole(bundle.sha256)


def test_a_site_that_takes_no_part_is_told_by_name(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 5000)
    _, link = opened(tmp_path, {"a": lambda head, payload: ({"error": "full"}, NOTHING)}, part_bytes=1000)
    lost = link.send("0" * 32, Bundle({"f": tmp_path / "file"}), {"a": 0}, all_of_it=True)
    assert lost == {"a": "its disk is full"}


def test_time_spent_on_one_sites_files_is_not_the_others(tmp_path):
    courier, link = opened(tmp_path, {"a": echo, "b": echo}, wait_s=0.1)
    found, courier.silent = [], {"b"}
    for answer in link.ask({site: {"kind": "x"} for site in "ab"}, 0.2, margin_s=0.2):
        found.append((answer.site, answer.lost))
        time.sleep(1.0)  # as long as fetching the rest of its files takes
        courier.silent = set()
    assert found == [("a", None), ("b", None)]


def test_an_answer_that_is_there_is_taken_after_the_limit_too(tmp_path):
    _, link = opened(tmp_path, {"a": echo, "b": echo}, wait_s=0.0)
    answers = link.ask({site: {"kind": "x"} for site in "ab"}, 0.0, margin_s=0.0)
    assert {answer.lost for answer in answers} <= {None, "it did not answer in time"}
    _, link = opened(tmp_path, {"a": echo}, wait_s=0.0)
    left = {"a": wire._Asked({"kind": "x"}, NOTHING)}
    link._look(force=True)
    link._push(left, 1.0)
    assert [answer.lost for answer in link._pull(left, tmp_path / "file", 0)] == [None]
    assert list(link._give_up(left, time.monotonic() - 1)) == []


def test_a_line_that_breaks_while_files_are_fetched_loses_no_other_answer(tmp_path):
    couriers = []

    def connect():
        couriers.append(FakeCourier({"a": echo, "b": echo}, tmp_path / f"line_{len(couriers)}"))
        return couriers[-1]

    link = Link(connect, Terms(wait_s=5), tmp_path / "link")
    answers = link.ask({"a": {"kind": "x"}, "b": {"kind": "x"}}, 5)
    assert next(answers).site == "a"
    couriers[0].breaks = 1
    assert asked(link, "a") == {"a": {"got": 0}}  # opens another line, which knows no earlier message
    assert len(couriers) == 2
    assert [(answer.site, answer.lost) for answer in answers] == [("b", None)]


def test_who_is_waited_for_is_in_the_log(tmp_path, caplog):
    courier, link = opened(tmp_path, {"a": echo})
    courier.silent.add("a")
    list(link.ask({"a": {"kind": "x"}}, 0.1, margin_s=0.1, remind_s=0.05))
    assert "no answer yet from a: busy with an earlier round, or away" in caplog.text


def test_a_site_that_takes_a_byte_at_a_time_is_given_up_at_once(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 5000)

    def drip(head, payload):
        return {"have": head["piece"]["offset"] + 1}, NOTHING

    courier, link = opened(tmp_path, {"a": drip}, part_bytes=1000)
    lost = link.send("0" * 32, Bundle({"f": tmp_path / "file"}), {"a": 0}, all_of_it=True)
    assert lost == {"a": "it takes no part of what it is sent"}
    assert len(courier.sent) == 1


@pytest.mark.parametrize("first", [1, 1000])
def test_a_site_that_sends_a_byte_at_a_time_is_given_up_at_once(first, tmp_path):
    data = b"x" * 5000
    sha = hashlib.sha256(data).hexdigest()

    def piece(at, length):
        part = data[at : at + length]
        return {"piece": vars(Piece(sha, len(data), at, hashlib.sha256(part).hexdigest()))}, Bytes(part)

    courier, link = opened(tmp_path, {"a": lambda head, payload: piece(head["offset"], 1)}, part_bytes=1000)
    line, part = piece(0, first)
    (tmp_path / "answer").write_bytes(part.data)
    with pytest.raises(ClientError, match="it sends less of a file than it was asked for"):
        link.fetch("0" * 32, wire.Came("a", line, tmp_path / "answer"))
    assert len(courier.sent) == (first == 1000)
