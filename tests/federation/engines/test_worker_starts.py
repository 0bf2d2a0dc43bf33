"""Workers that hang, fail or die while they start or wait: none of it ends a run in which another can work."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from fedproxy.errors import ClientError
from fedproxy.federation.engines import Engine
from fedproxy.messages import Dropped, UpdateFile

from .doubles import CLIENTS, broadcast, remote

Workers = Engine.by_name("workers")


@pytest.fixture
def make_pool(tmp_path):
    """Pools whose workers obey the word in the file ``start`` when they start."""
    pools = []

    def make(**options):
        pools.append(Workers(**options).start(lambda: None, remote(tmp_path, "starting_client"), tmp_path / "pool"))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def answers(pool, clients=CLIENTS, **options):
    return {answer.client_id: answer for answer in pool.run(broadcast(), clients, **options)}


def assert_all_answered(got, clients=CLIENTS):
    assert sorted(got) == sorted(clients)
    assert all(isinstance(answer, UpdateFile) for answer in got.values()), got


def starts(folder):
    """Process ids of all workers that came to make their client."""
    return [int(line) for line in (folder / "starts").read_text().split()]


def allow(pool, seconds):
    pool.limits.start_s = seconds


def with_second_worker(pool, folder, word):
    """Bring one worker up, let another start under a word until that has been read, and return its process id."""
    pool.size = 1
    assert_all_answered(answers(pool))
    (ready,) = pool.pids
    (folder / "start").write_text(word)
    pool.size = 2
    (folder / "ann").write_text("slow")
    while len(starts(folder)) < 2:
        assert_all_answered(answers(pool))
    assert pool.pids[0] == ready
    return starts(folder)[1]


def test_workers_that_hang_while_they_start_are_one_line(make_pool, tmp_path):
    (tmp_path / "start").write_text("hang")
    pool = make_pool(workers=1, start_timeout_s=0.5)
    started = time.monotonic()
    message = r"workers cannot start, the last one: it hung: not ready within engine.start_timeout_s of 0.5 s; .* raise"
    with pytest.raises(ClientError, match=message):
        answers(pool)
    assert time.monotonic() - started < 60
    assert not pool.pids


def test_a_worker_that_hangs_while_it_starts_is_replaced(make_pool, tmp_path, caplog):
    pool = make_pool(workers=2)
    stuck = with_second_worker(pool, tmp_path, "hang once")
    allow(pool, 60.0)
    next(seat for seat in pool._seats if seat.processes[0].pid == stuck).since -= 61.0  # a minute passes
    while len(starts(tmp_path)) < 3:
        assert_all_answered(answers(pool))
    assert stuck not in pool.pids
    assert f"worker replaced: process {stuck} hung: not ready within engine.start_timeout_s of 60 s" in caplog.messages
    assert pool.size == 2


@pytest.mark.parametrize(
    ("word", "how"), [("fail", "cannot start: out of device memory"), ("die", "was ended with exit code 3")]
)
def test_a_place_that_cannot_be_filled_again_is_given_up_while_another_worker_is_left(
    make_pool, tmp_path, caplog, word, how
):
    pool = make_pool(workers=2)
    with_second_worker(pool, tmp_path, word)
    while pool.size == 2:
        assert_all_answered(answers(pool))
    assert len(starts(tmp_path)) == 3  # one that works, and two tries
    said = [line.partition(" ")[2].split(" ", 3) for line in caplog.messages if line.startswith("worker")]
    assert [line[0] for line in said] == ["replaced:", "lost:"]
    assert said[0][3].startswith(how)
    assert said[1][3].startswith(how)
    assert said[1][3].endswith(" (2 tries); workers left: 1")
    (tmp_path / "ann").write_text("die")
    with pytest.raises(ClientError, match=f"workers cannot start, the last one: it {how}"):
        answers(pool)  # the last one dies, and there is nobody to take its place


def test_a_failed_start_does_not_end_the_run_of_a_killed_worker(make_pool, tmp_path, caplog):
    pool = make_pool(workers=1)
    assert_all_answered(answers(pool))
    (tmp_path / "start").write_text("fail once")
    (tmp_path / "bob").write_text("die once")
    assert_all_answered(answers(pool))
    assert len(starts(tmp_path)) == 3
    assert "was killed by SIGKILL; client 'bob' is tried again" in caplog.messages[0]
    assert "cannot start: out of device memory" in caplog.messages[1]


def test_a_round_that_runs_out_of_time_gives_up_a_stuck_start(make_pool, tmp_path):
    pool = make_pool(workers=2)
    stuck = with_second_worker(pool, tmp_path, "hang once")
    (tmp_path / "bob").write_text("hang once")
    late = "late: no update within federation.round_timeout_s of 2 s"
    assert answers(pool, timeout_s=2.0)["bob"] == Dropped("bob", late)
    assert pool.pids == []  # the one that held bob, and the one that never got ready
    assert not Path(f"/proc/{stuck}/cmdline").exists() or not Path(f"/proc/{stuck}/cmdline").read_bytes()
    assert_all_answered(answers(pool))


def test_a_rounds_time_starts_when_the_first_worker_is_ready(make_pool, tmp_path):
    (tmp_path / "start").write_text("slow")  # takes 4 s
    assert_all_answered(answers(make_pool(workers=1), timeout_s=3.0))


def test_a_worker_killed_while_idle_costs_its_next_client_no_try(make_pool, tmp_path, caplog):
    pool = make_pool(workers=1)
    assert_all_answered(answers(pool))
    (idle,) = pool.pids
    os.kill(idle, signal.SIGKILL)
    while pool._seats[0].processes[0].alive:
        time.sleep(0.01)
    (tmp_path / "ann").write_text("die once")  # the first of its two tries
    assert_all_answered(answers(pool))
    assert caplog.messages[0] == f"worker replaced: process {idle} was killed by SIGKILL"


def test_a_worker_that_dies_before_it_takes_a_client_up_costs_no_try(make_pool, tmp_path, caplog):
    pool = make_pool(workers=1)
    assert_all_answered(answers(pool))
    (idle,) = pool.pids
    os.kill(idle, signal.SIGSTOP)  # alive when the client is handed out, and deaf
    threading.Timer(1.0, os.kill, (idle, signal.SIGKILL)).start()
    (tmp_path / "ann").write_text("die once")
    assert_all_answered(answers(pool))
    assert caplog.messages[0] == f"worker replaced: process {idle} was killed by SIGKILL; client 'ann' is tried again"
