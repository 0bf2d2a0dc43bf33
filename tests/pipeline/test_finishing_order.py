"""Whole runs in which clients finish in forced orders, or lose their worker in mid-client: always the same bits."""

import json
import os
import signal
import threading
from functools import cache

import pytest
import torch
from safetensors.torch import load_file

from fedproxy.federation.server.participation import _Round

from . import hooked_clients
from .hooked_clients import wait_for_file

ROUNDS = ("federation.rounds=2", "evaluation.models=[]")
CLIENTS = ("tiny_colors", "tiny_opposites", "tiny_places", "tiny_sums")


@pytest.fixture(scope="module")
def quiet(run_tiny):
    """Return the folder of a run in this process, one client after the other, by its regularizer."""
    return cache(
        lambda regularizer: run_tiny(
            *ROUNDS, f"regularizer.name={regularizer}", "engine.name=in_process", "engine.threads=1"
        )[1]
    )


@pytest.fixture
def hooks(tmp_path, monkeypatch):
    """Folder that tells the clients of :mod:`hooked_clients` what to do."""
    folder = tmp_path / "hooks"
    folder.mkdir()
    monkeypatch.setenv(hooked_clients.VARIABLE, str(folder))
    return folder


@pytest.fixture
def order(monkeypatch):
    """The clients of all rounds in the order in which the server got their updates."""
    seen, take = [], _Round.take

    def noted(self, answer):
        seen.append(answer.client_id)
        take(self, answer)

    monkeypatch.setattr(_Round, "take", noted)
    return seen


def run_hooked(run_tiny, workers, regularizer="conflict"):
    engine = ("engine.name=workers", f"engine.workers={workers}", f"plugins=[{hooked_clients.NAME}]")
    return run_tiny(*ROUNDS, *engine, f"regularizer.name={regularizer}")[1]


def journal(folder):
    """The rounds' records without what a clock said."""
    records = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if not key.endswith("seconds")} for record in records]


def assert_same_bits(left, right):
    groups = [
        sorted(path.name for path in (run / "checkpoints/round_0002").glob("*.safetensors")) for run in (left, right)
    ]
    assert groups[0] == groups[1]
    for group in groups[0]:
        a, b = (load_file(run / f"checkpoints/round_0002/{group}") for run in (left, right))
        assert sorted(a) == sorted(b)
        assert all(torch.equal(a[name], b[name]) for name in a), group
    assert journal(left) == journal(right)


@pytest.mark.parametrize(
    ("workers", "finished", "regularizer"),
    [
        (2, [1, 2, 3, 0], "conflict"),  # the first worker's client waits for all that the second worker trains
        (3, [2, 3, 1, 0], "scaffold"),  # whose shared memory is a sum that the server takes outside the aggregator
    ],
)
def test_the_order_in_which_clients_finish_leaves_no_trace_in_the_bits(
    run_tiny, quiet, hooks, order, workers, finished, regularizer
):
    for number, client in enumerate(CLIENTS[: workers - 1]):
        (hooks / f"{client}.after").write_text(" ".join(CLIENTS[number + 1 :]))
    folder = run_hooked(run_tiny, workers, regularizer)
    assert order == 2 * [CLIENTS[number] for number in finished]
    assert_same_bits(quiet(regularizer), folder)


def test_a_worker_killed_in_mid_client_costs_nobody_anything(run_tiny, quiet, hooks, capsys):
    held = hooks / "2_tiny_places.hold"
    held.touch()
    killed = []

    def kill():
        wait_for_file(held.with_suffix(".pid"))
        killed.append(int(held.with_suffix(".pid").read_text()))
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    folder = run_hooked(run_tiny, 2)
    killer.join()
    line = f"worker replaced: process {killed[0]} was killed by SIGKILL; client 'tiny_places' is tried again"
    assert line in capsys.readouterr().err.splitlines()
    assert [(line["clients"], line.get("dropped")) for line in journal(folder)] == 2 * [(list(CLIENTS), None)]
    assert_same_bits(quiet("conflict"), folder)
