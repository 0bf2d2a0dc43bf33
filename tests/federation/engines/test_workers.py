"""Workers: faults tried for real on processes that die, hang and lie; test_same_bits.py has the real client."""

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedproxy.errors import ClientError, ConfigError
from fedproxy.federation.engines import Engine, RemoteClient
from fedproxy.federation.server.participation import Participation
from fedproxy.messages import Dropped
from fedproxy.protocol import Broadcast, Mapped

from .doubles import CLIENTS, broadcast, honest, loaded, remote

Workers = Engine.by_name("workers")


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Folder in which clients find what to do."""
    return tmp_path_factory.mktemp("words")


@pytest.fixture(scope="module")
def shared_pool(words, tmp_path_factory):
    """Two workers for all tests of this file: starting one takes seconds."""
    pool = Workers(workers=2, client_timeout_s=None).start(_never, remote(words), tmp_path_factory.mktemp("x") / "pool")
    yield pool
    pool.close()


@pytest.fixture
def pool(shared_pool, words):
    """The shared workers, and clients that all behave."""
    for path in words.iterdir():
        path.unlink()
    return shared_pool


def _never():
    raise AssertionError("the server's process trains no client")


def answers(pool, **options):
    return {answer.client_id: answer for answer in pool.run(broadcast(3), CLIENTS, **options)}


def collect(pool, **terms):
    """Run a round on the terms of a run and return updates and reasons by client."""
    updates, dropped = Participation(min_clients=1, **terms).collect(pool, broadcast(3), CLIENTS)
    return {update.client_id: update for update in updates}, dropped


def pids(words, client):
    return {int(line) for line in (words / f"{client}.seen").read_text().split()}


def assert_honest(update):
    assert not isinstance(update, Dropped), update
    update = loaded(update)
    expected = honest(update.client_id, 3)
    assert all(torch.equal(update.delta[name], tensor) for name, tensor in expected.delta.items())
    assert (update.num_examples, update.train_loss, update.round) == (2, 1.0, 3)


def test_all_clients_answer_from_two_other_processes(pool, words):
    for client in CLIENTS:
        (words / client).write_text("slow")  # else the first worker may be done with all before the second is up
    got = answers(pool)
    assert sorted(got) == list(CLIENTS)
    for update in got.values():
        assert_honest(update)
    seen = set.union(*(pids(words, client) for client in CLIENTS))
    assert os.getpid() not in seen
    assert seen == set(pool.pids)
    assert len(seen) == 2


def test_two_runs_of_the_same_round_start_from_their_own_states(pool, words):
    def moved(value):
        state = {name: torch.full_like(tensor, value) for name, tensor in broadcast(3).state.items()}
        (words / "ann").write_text("echo")
        (update,) = pool.run(replace(broadcast(3), state=state), ("ann",))
        return float(loaded(update).delta["b"][0])

    assert [moved(1.0), moved(2.0), moved(5.0)] == [1.0, 2.0, 5.0]


def test_each_client_starts_from_its_own_state_also_in_a_second_try(pool, words):
    for client in CLIENTS:
        (words / client).write_text("echo" if client != "bob" else "die once")
    values = {client: 1.0 + k for k, client in enumerate(CLIENTS)}
    states = {
        client: {name: torch.full_like(tensor, value) for name, tensor in broadcast(3).state.items()}
        for client, value in values.items()
    }
    each = Mapped(states, lambda _, state: Broadcast(3, state))
    got = {answer.client_id: loaded(answer) for answer in pool.run(Broadcast(3, {}, each=each), CLIENTS)}
    assert len(pids(words, "bob")) == 2
    assert_honest(got.pop("bob"))
    assert {client: float(update.delta["a"][0, 0]) for client, update in got.items()} == {
        client: value for client, value in values.items() if client != "bob"
    }


def test_a_killed_worker_is_replaced_and_its_client_tried_again(pool, words):
    (words / "bob").write_text("die once")
    got = answers(pool)
    assert len(pids(words, "bob")) == 2
    for client in CLIENTS:
        assert_honest(got[client])


def test_a_client_that_kills_its_worker_twice_is_dropped(pool, words):
    (words / "bob").write_text("die")
    got = answers(pool)
    assert got["bob"] == Dropped("bob", "its worker was killed by SIGKILL (2 tries)")
    assert_honest(got["dot"])


def test_what_is_no_update_is_refused_and_never_unpickled(pool, words):
    for client, word in {"ann": "pickle", "bob": "truncated", "cid": "name"}.items():
        (words / client).write_text(word)
    updates, dropped = collect(pool)
    assert list(updates) == ["dot"]
    assert dropped["ann"].startswith("its update is not a readable safetensors file (the file is shorter")
    assert dropped["bob"].startswith("its update is not a readable safetensors file (its tensors have 40 bytes")
    assert dropped["cid"] == "its update is in the name of client 'dot'"


def test_figures_and_headers_that_crash_a_reader_drop_their_clients(pool, words):
    for client, word in {"ann": "seconds 1e400", "bob": "nested", "cid": "loss nan"}.items():
        (words / client).write_text(word)
    updates, dropped = collect(pool)
    assert list(updates) == ["dot"]
    assert "has a header that cannot be read (it cannot be read (a number has 401 digits)); ask" in dropped["ann"]
    assert dropped["bob"].startswith("its update has 1000")  # bytes, more than any update of this round
    assert dropped["cid"] == "the update's train_loss must be a number from -1e+09 to 1e+09, got nan"


def test_a_time_limit_may_be_months(pool, words):
    pool.limits.client_s = 3e6  # more than a single wait may last
    try:
        for update in answers(pool, timeout_s=1e12).values():
            assert_honest(update)
    finally:
        pool.limits.client_s = None


def test_a_single_wait_that_ends_is_followed_by_another(pool, words, monkeypatch):
    monkeypatch.setattr("fedproxy.federation.engines.pool.LONGEST_WAIT_S", 0.01)
    (words / "ann").write_text("slow")  # .3 s
    for update in answers(pool, timeout_s=1e12).values():
        assert_honest(update)


def test_a_hung_worker_is_replaced_and_late_clients_are_dropped(pool, words):
    (words / "ann").write_text("hang once")
    (words / "bob").write_text("hang")
    pool.limits.client_s = 5.0
    try:
        got = answers(pool)
    finally:
        pool.limits.client_s = None
    assert_honest(got["ann"])
    assert len(pids(words, "ann")) == 2
    assert got["bob"].reason == "its worker hung: no update within engine.client_timeout_s of 5 s (2 tries)"
    (words / "bob").unlink()
    while len({pid for client in CLIENTS for pid in pids(words, client)} & set(pool.pids)) < 2:  # both workers are up
        for client in CLIENTS:
            (words / client).write_text("slow once")
        answers(pool)
    (words / "bob").write_text("hang")
    started = time.monotonic()
    got = answers(pool, timeout_s=10.0)
    assert time.monotonic() - started < 60
    assert got["bob"] == Dropped("bob", "late: no update within federation.round_timeout_s of 10 s")
    assert_honest(got["cid"])


def test_closing_a_round_early_stops_who_still_trains(pool, words):
    (words / "ann").write_text("hang")
    running = pool.run(broadcast(3), ("ann", "bob"))
    assert next(running).client_id == "bob"
    (hung,) = pids(words, "ann")
    running.close()
    assert hung not in pool.pids
    assert not Path(f"/proc/{hung}/cmdline").exists() or not Path(f"/proc/{hung}/cmdline").read_bytes()


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("broken_factory", r"engine.name=workers: a worker cannot start: this proxy cannot be loaded"),
        ("dying_factory", r"engine.name=workers: workers cannot start, the last one: .* exit code 3"),
        ("no_factory", r"a worker cannot start: AttributeError: .*no_factory"),
    ],
)
def test_workers_that_cannot_start_are_one_line(tmp_path, factory, message):
    remote = RemoteClient(f"{__name__.rpartition('.')[0]}.doubles:{factory}")
    pool = Workers(workers=1).start(_never, remote, tmp_path / "pool")
    try:
        with pytest.raises(ClientError, match=message):
            list(pool.run(broadcast(), CLIENTS))
    finally:
        pool.close()
    assert not (tmp_path / "pool").exists()


def test_devices_get_one_worker_each(tmp_path):
    def count(places, ranks=1, **options):
        return Workers(**options).count(RemoteClient("none:needed", devices=places, ranks=ranks))

    assert count([0, 1, 2]) == 3
    assert count([], threads=1024) == 1
    assert count([], ranks=10**6) == 1
    assert count([0], workers=5) == 5


def test_options_are_checked():
    with pytest.raises(ConfigError, match=r"engine.workers must be 'auto' or at least 1, got 0"):
        Workers(workers=0)
    with pytest.raises(ConfigError, match=r"engine.threads must be from 1 to 1024, got 0"):
        Workers(threads=0)
    with pytest.raises(ConfigError, match=r"engine.client_timeout_s must be positive, or null, got -1"):
        Workers(client_timeout_s=-1)
    with pytest.raises(ConfigError, match=r"engine.start_timeout_s must be positive, got 0"):
        Workers(start_timeout_s=0)
