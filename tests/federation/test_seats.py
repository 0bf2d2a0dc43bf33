"""Clients of several processes: faults tried for real on light processes; test_ranks.py has those that train."""

import os
import time
from pathlib import Path

import pytest
import torch

from fedproxy.errors import ClientError
from fedproxy.federation.engines import Engine
from fedproxy.messages import Dropped, UpdateFile

from .engines.doubles import broadcast, honest, loaded
from .rank_doubles import remote


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Folder in which processes find what to do."""
    return tmp_path_factory.mktemp("words")


@pytest.fixture(scope="module")
def shared_pool(words, tmp_path_factory):
    """One seat for all tests of this file: starting processes takes seconds."""
    start = Engine.by_name("in_process")(threads=2).start
    pool = start(lambda: pytest.fail("no client is made here"), remote(words), tmp_path_factory.mktemp("x") / "pool")
    assert (pool.size, pool.threads) == (1, 1)
    yield pool
    pool.close()
    assert pool.pids == []


@pytest.fixture
def pool(shared_pool, words):
    for path in words.iterdir():
        path.unlink()
    return shared_pool


def train(pool, client_id, round_=3, **options):
    (answer,) = pool.run(broadcast(round_), [client_id], **options)
    return answer


def seen(words, rank):
    """Clients that a process was given, and the ids of the processes of this rank."""
    lines = [line.split() for line in (words / f"seen_{rank}").read_text().splitlines()]
    return [client for client, _ in lines], {int(pid) for _, pid in lines}


def assert_honest(update, client_id, round_=3):
    assert isinstance(update, UpdateFile), update
    update = loaded(update)
    assert update.client_id == client_id
    assert all(torch.equal(update.delta[name], tensor) for name, tensor in honest(client_id, round_).delta.items())


def gone(pid):
    path = Path(f"/proc/{pid}/cmdline")
    return not path.exists() or not path.read_bytes()


def test_every_process_trains_every_client_and_the_first_alone_writes(pool, words):
    first, second = pool.run(broadcast(3), ["ann", "bob"])
    assert_honest(second, "bob")
    assert_honest(first, "ann")  # its file is still there
    pids = []
    for rank in range(2):
        clients, ids = seen(words, rank)
        assert clients == ["ann", "bob"]
        pids += ids
    assert pids == pool.pids
    assert os.getpid() not in pids
    files = sorted(path.name for path in first.path.parent.iterdir())
    assert len(files) == 3  # the broadcast, written once, and one update for each client
    train(pool, "ann", 4)
    assert not first.path.exists()


def test_a_process_that_dies_takes_the_others_along_and_the_client_is_tried_again(pool, words):
    train(pool, "ann")
    (words / "seen_1").unlink()
    (words / "rank_1").write_text("die once")
    (words / "rank_0").write_text("hang once")  # as a process does whose partner is gone
    started = time.monotonic()
    assert_honest(train(pool, "ann"), "ann")
    assert time.monotonic() - started < 120
    assert seen(words, 1)[0] == ["ann", "ann"]
    assert all(gone(next(iter(seen(words, rank)[1] - set(pool.pids)))) for rank in range(2))


def test_the_death_is_the_reason_and_not_what_it_does_to_others(pool, words):
    (words / "rank_0").write_text("peer gone")
    (words / "rank_1").write_text("die")
    assert train(pool, "ann") == Dropped("ann", "its process 2 of 2 was killed by SIGKILL (2 tries)")
    assert pool.pids == []


def test_a_failure_is_told_and_ends_who_waits(pool, words):
    (words / "rank_1").write_text("fail once")
    (words / "rank_0").write_text("hang once")
    failed, fine = pool.run(broadcast(3), ["ann", "bob"])
    assert failed == Dropped("ann", "process 2 of 2: ClientError; no log is kept")
    assert_honest(fine, "bob")


def test_processes_that_hang_are_ended_at_the_rounds_deadline(pool, words):
    train(pool, "ann", 2)  # brings the processes up
    (words / "rank_1").write_text("hang once")
    pids = pool.pids
    answers = list(pool.run(broadcast(3), ["ann", "bob"], timeout_s=3.0))
    assert answers[0] == Dropped("ann", "late: no update within federation.round_timeout_s of 3 s")
    assert all(gone(pid) for pid in pids)
    assert pool.pids == []


def test_processes_that_cannot_start_are_one_line(pool, words):
    pool.close()
    fresh = Engine.by_name("in_process")().start(lambda: None, remote(words), words / "pool")
    (words / "start_1").touch()
    (words / "slow_0").touch()  # the one that fails has ended before the other is heard: its words are the reason
    message = r"^trainer.devices: 2 processes for each client: .* cannot start: process 2 of 2: there is no room"
    try:
        with pytest.raises(ClientError, match=message):
            train(fresh, "ann")
    finally:
        fresh.close()
