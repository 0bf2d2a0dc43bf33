"""Processes of one client: faults tried for real on light processes; test_ranks.py has those that train."""

import os
import time
from pathlib import Path

import pytest
import torch

from fedproxy.errors import ClientError
from fedproxy.federation.engines import Engine
from fedproxy.federation.engines.rank_group import RankGroup
from fedproxy.protocol import Dropped, UpdateFile

from .engines.doubles import broadcast, honest, loaded
from .rank_doubles import remote


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Folder in which processes find what to do."""
    return tmp_path_factory.mktemp("words")


@pytest.fixture(scope="module")
def shared_group(words, tmp_path_factory):
    """One group for all tests of this file: starting processes takes seconds."""
    group = RankGroup(remote(words), 2, scratch=str(tmp_path_factory.mktemp("x") / "exchange"))
    yield group
    group.close()
    assert group.pids == []


@pytest.fixture
def group(shared_group, words):
    for path in words.iterdir():
        path.unlink()
    return shared_group


def seen(words, rank):
    """Clients that a process was given, and the ids of the processes of this rank."""
    lines = [line.split() for line in (words / f"seen_{rank}").read_text().splitlines()]
    return [client for client, _ in lines], {int(pid) for _, pid in lines}


def assert_honest(update, client_id, round_=3):
    update = loaded(update)
    assert update.client_id == client_id
    assert all(torch.equal(update.delta[name], tensor) for name, tensor in honest(client_id, round_).delta.items())


def gone(pid):
    path = Path(f"/proc/{pid}/cmdline")
    return not path.exists() or not path.read_bytes()


def test_every_process_trains_every_client_and_the_first_alone_writes(group, words):
    given = broadcast(3)
    first, second = group.train(given, "ann"), group.train(given.addressed_to("bob"), "bob")
    assert_honest(second, "bob")
    assert_honest(first, "ann")  # its file is still there
    assert isinstance(first, UpdateFile)
    pids = []
    for rank in range(2):
        clients, ids = seen(words, rank)
        assert clients == ["ann", "bob"]
        pids += ids
    assert pids == group.pids
    assert os.getpid() not in pids
    files = sorted(path.name for path in first.path.parent.iterdir())
    assert len(files) == 3  # the broadcast, written once, and one update for each client
    group.train(broadcast(4), "ann")
    assert not first.path.exists()


def test_a_process_that_dies_takes_the_others_along_and_the_client_is_tried_again(group, words):
    (words / "rank_1").write_text("die once")
    (words / "rank_0").write_text("hang once")  # as a process does whose partner is gone
    started = time.monotonic()
    assert_honest(group.train(broadcast(3), "ann"), "ann")
    assert time.monotonic() - started < 120
    assert seen(words, 1)[0] == ["ann", "ann"]
    assert all(gone(next(iter(seen(words, rank)[1] - set(group.pids)))) for rank in range(2))


def test_the_death_is_the_reason_and_not_what_it_does_to_others(group, words):
    (words / "rank_0").write_text("peer gone")
    (words / "rank_1").write_text("die")
    with pytest.raises(ClientError, match=r"^its process 2 of 2 was killed by SIGKILL \(2 tries\)$"):
        group.train(broadcast(3), "ann")
    assert group.pids == []


def test_a_failure_is_told_and_ends_who_waits(group, words):
    (words / "rank_1").write_text("fail once")
    (words / "rank_0").write_text("hang once")
    with pytest.raises(ClientError, match=r"^process 2 of 2: ClientError; no log is kept$"):
        group.train(broadcast(3), "ann")
    assert group.pids == []
    assert_honest(group.train(broadcast(3), "bob"), "bob")


def test_a_process_that_hangs_is_ended_at_the_rounds_deadline(group, words):
    group.train(broadcast(2), "ann")  # brings the processes up
    (words / "rank_1").write_text("hang once")
    pids = group.pids
    engine = Engine.by_name("in_process")().start(lambda: group, remote(words), Path())
    answers = list(engine.run(broadcast(3), ["ann", "bob"], timeout_s=3.0))
    assert answers[0] == Dropped("ann", "late: no update within federation.round_timeout_s of 3 s")
    assert all(gone(pid) for pid in pids)
    engine.close()
    assert group.pids == []


def test_a_deadline_may_be_months_away_and_waits_are_short(group, words, monkeypatch):
    assert_honest(group.train(broadcast(3), "ann", deadline=time.monotonic() + 3e6), "ann")
    monkeypatch.setattr("fedproxy.federation.engines.rank_group.LONGEST_WAIT_S", 1e-3)
    assert_honest(group.train(broadcast(4), "bob", deadline=time.monotonic() + 3e6), "bob", 4)


def test_processes_that_cannot_start_are_one_line(group, words):
    group.close()
    (words / "start_1").touch()
    with pytest.raises(ClientError, match=r"^process 2 of 2: there is no room for the proxy$"):
        group.train(broadcast(3), "ann")
