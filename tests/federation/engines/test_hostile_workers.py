"""Workers that lie: what they say and leave is bounded, and none of it ends a round or holds it up."""

import hashlib
import json
import os
import re
import sys
import time
from pathlib import Path

import pytest
import torch

from fedproxy.federation.engines import Engine, RemoteClient
from fedproxy.federation.server.participation import Participation
from fedproxy.messages import Dropped
from fedproxy.protocol import Broadcast, Kept
from fedproxy.seeding import ClientSeeds

from .doubles import CLIENTS, STATE, broadcast, honest

LIES = [
    ("garbage", "sent a line that is not a message: it is not valid JSON"),
    ("list", "sent a line that is not a message: it must hold an object, got list"),
    ("deep", "sent a line that is not a message: it is nested too deeply"),
    ("digits", "sent a line that is not a message: it cannot be read"),
    ("bytes", "sent a line that is not a message: it is not UTF-8 text"),
    ("types", "sent a line that is not a message"),
    ("no reason", "sent a line that is not a message"),
    ("no share", "sent a line that is not a message"),
    ("share of another", "answered what it was not asked"),
    ("other task", "answered what it was not asked"),
    ("ready again", "answered what it was not asked"),
    ("twice", "said the same twice"),
    ("flood", "answered what it was not asked"),
    ("long", "sent a line of more than 16384 bytes"),
    ("flood of bytes", "sent a line of more than 16384 bytes"),
    ("exit", "was ended with exit code 3; details in "),
    ("signal", "was killed by signal 40"),
]
UPDATES = [
    ("missing", "its update cannot be read (No such file or directory)"),
    ("fifo", "its update cannot be read (it is not a regular file)"),
    ("link", "its update cannot be read (Too many levels of symbolic links)"),
    ("folder", "its update cannot be read (it is not a regular file)"),
    ("sparse", "its update has 1099511627776 bytes, an update of this round has at most "),
    ("reason", "one two xxx"),
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Folder in which the processes find what to do; they start in milliseconds."""
    script = Path(__file__).with_name("hostile_worker.py")
    light = tmp_path / "python"
    light.write_text(f'#!/bin/sh\nshift 2\nexec "{sys.executable}" -S "{script}" "$@"\n')
    light.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(light))
    words = tmp_path / "words"
    words.mkdir()
    for client in CLIENTS:
        honest(client, 3).save(words / f"{client}.update")
    return words


def remote(folder, ranks=1):
    return RemoteClient("none:needed", {"folder": str(folder)}, logs=str(folder / "logs"), ranks=ranks)


@pytest.fixture
def pool(folder, tmp_path):
    workers = Engine.by_name("workers")
    pool = workers(workers=2).start(lambda: None, remote(folder), tmp_path / "exchange")
    yield pool
    pool.close()


def seal(client):
    return hashlib.sha256(client.encode()).hexdigest()


def collect(pool, *clients, **terms):
    seeds, kept = {c: ClientSeeds.of(77, 3, c) for c in CLIENTS}, {c: Kept(2, seal(c)) for c in CLIENTS}
    sent = Broadcast(3, STATE, job={"lr": 0.5}, all_seeds=seeds, all_kept=kept)
    updates, dropped = Participation(min_clients=1, **terms).collect(pool, sent, clients or CLIENTS)
    for update in updates:
        expected = honest(update.client_id, 3).delta
        assert all(torch.equal(update.delta[name], tensor) for name, tensor in expected.items())
    return [update.client_id for update in updates], dropped


@pytest.mark.parametrize(("word", "how"), LIES)
def test_a_worker_that_lies_is_replaced_and_its_client_dropped_after_two_tries(pool, folder, caplog, word, how):
    (folder / "bob").write_text(f"{word} once")
    assert collect(pool) == (list(CLIENTS), {})
    (line,) = [line for line in caplog.messages if "client 'bob' is tried again" in line]
    assert how in line
    (folder / "bob").write_text(word)
    ids, dropped = collect(pool)
    assert ids == ["ann", "cid", "dot"]
    assert dropped["bob"].startswith(f"its worker {how}")
    assert dropped["bob"].endswith("(2 tries)")
    assert "private row" not in dropped["bob"] + caplog.text


def test_how_far_clients_have_come_is_told(pool, folder):
    told = []
    pool.working = lambda number, client, share: told.append((number, client, share))
    (folder / "bob").write_text("busy")
    assert collect(pool) == (list(CLIENTS), {})
    assert {(number, client) for number, client, _ in told} == {(3, "bob")}
    shares = [share for *_, share in told]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


@pytest.mark.parametrize(("word", "reason"), UPDATES)
def test_what_lies_in_an_updates_place_is_no_trap(pool, folder, word, reason):
    (folder / "bob").write_text(word)
    started = time.monotonic()
    ids, dropped = collect(pool)
    assert time.monotonic() - started < 60
    assert ids == ["ann", "cid", "dot"]
    assert dropped["bob"].startswith(reason)
    assert dropped["bob"].isprintable()
    assert len(dropped["bob"]) <= 300
    assert (folder / "bob.update").is_file()  # the link is put away, not what it points to


def test_a_worker_that_closes_its_output_is_killed(pool, folder, monkeypatch):
    monkeypatch.setattr("fedproxy.federation.engines.process._ENDING_S", 0.2)
    (folder / "bob").write_text("closed")
    assert collect(pool)[1] == {"bob": "its worker was killed, since it had closed its output (2 tries)"}


def test_a_folder_that_cannot_be_deleted_ends_no_run(pool, folder):
    (folder / "bob").write_text("locked once")
    assert list(collect(pool)[1]) == ["bob"]
    assert collect(pool) == (list(CLIENTS), {})


def test_a_worker_that_does_not_read_holds_nobody_up(pool, folder):
    collect(pool)
    process = pool._seats[0].processes[0]
    os.kill(process.pid, 19)  # SIGSTOP
    started = time.monotonic()
    for _ in range(200):
        process.send({"task": 0, "client": "x" * 1000})
    assert time.monotonic() - started < 30
    assert process.ended() == "killed by SIGKILL"


def test_every_worker_is_told_what_is_its_own_clients_alone(pool, folder):
    collect(pool)
    told = [json.loads(line) for line in (folder / "told").read_text().splitlines()]
    assert len(told) == len(CLIENTS)
    for task in told:
        seeds = ClientSeeds.of(77, 3, task["client"])
        own = {"batches": seeds.batches, "dropout": list(seeds.dropout), "parts": seeds.parts}
        kept = {"round": 2, "seal": seal(task["client"])}
        assert task["message"] == {"kind": "train", "seeds": own, "kept": kept}
        assert set(task) == {"task", "client", "round", "broadcast", "update", "message"}


def test_logs_of_workers_are_private_and_no_trap(folder, tmp_path):
    logs = folder / "logs"
    logs.mkdir()
    os.mkfifo(logs / "worker_0001.log")
    (logs / "worker_0002.log").symlink_to(tmp_path / "elsewhere")
    pool = Engine.by_name("workers")(workers=2).start(lambda: None, remote(folder), tmp_path / "exchange")
    try:
        collect(pool)
    finally:
        pool.close()
    assert not (tmp_path / "elsewhere").exists()
    assert logs.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in logs.iterdir()} == {0o600}


@pytest.mark.parametrize(("word", "how"), LIES)
def test_a_process_of_several_that_lies_drops_the_client(folder, tmp_path, word, how):
    pool = Engine.by_name("in_process")().start(lambda: None, remote(folder, 2), tmp_path / "exchange")
    (folder / "bob").write_text(word)
    try:
        ids, dropped = collect(pool, "ann", "bob", round_timeout_s=60.0)
    finally:
        pool.close()
    assert ids == ["ann"]
    assert re.fullmatch(rf"its process [12] of 2 {re.escape(how)}.* \(2 tries\)", dropped["bob"])


def test_a_flood_does_not_push_a_deadline_away(folder, tmp_path):
    engine = Engine.by_name("in_process")().start(lambda: None, remote(folder, 2), tmp_path / "exchange")
    (folder / "bob").write_text("flood")
    try:
        (answer,) = engine.run(broadcast(3), ["bob"], timeout_s=20.0)
    finally:
        engine.close()
    assert isinstance(answer, Dropped)
