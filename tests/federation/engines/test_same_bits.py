"""The same bits in this process and in 1, 2 and 3 workers, from files that hold one client's rows each."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from fedproxy.data.assets import resolve
from fedproxy.data.partition.rows import ClientRows, rows_file
from fedproxy.data.rows import Row
from fedproxy.errors import ClientError
from fedproxy.federation.client.base import Attempt
from fedproxy.federation.client.setup import LocalSetup, load
from fedproxy.federation.client.site import Site
from fedproxy.federation.engines import Engine
from fedproxy.messages import Dropped
from fedproxy.models import load_tokenizer
from fedproxy.modules import callbacks
from fedproxy.names import file_stem
from fedproxy.protocol import Broadcast, ClientUpdate
from fedproxy.seeding import ClientSeeds

from .doubles import loaded

CLIENTS = ("a/b", "c", "d", "e")
JOB = {
    "lr": 0.01, "batch_size": 2, "accumulate": 1, "epochs": 2, "weight_decay": 0.0, "max_grad_norm": 1.0,
    "regularizer": {"name": "conflict", "strength": 0.1}, "frozen": [], "parts": [{"name": "conflict"}],
}  # fmt: skip
SEEDS = {client: ClientSeeds.of(7, 2, client) for client in CLIENTS}


def rows(client, count):
    text = f"Question: How much is {client}?\nAnswer:"
    return [Row(text * (1 + i % 2), f" {i} and {i + 1}", "made_up", f"made_up/train/{client}{i}") for i in range(count)]


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clients") / "rows"
    ClientRows({client: rows(client, 3 + k) for k, client in enumerate(CLIENTS)}, folder)
    return LocalSetup(
        proxy=str(resolve("asset:tiny-llama")),
        dtype="float32",
        trainable={"name": "lora", "r": 2, "dropout": 0.1},
        rows=str(folder),
        store=str(folder.parent / "kept"),
        max_input_tokens=32,
        max_target_tokens=8,
        trainer={"accelerator": "cpu", "devices": 1},
    )


@pytest.fixture(scope="module")
def client(setup) -> Site:
    return load(device=None, **asdict(setup))


@pytest.fixture(scope="module")
def broadcast(client):
    """Round 2, with a conflict map, from a state in which B is not zero."""
    draw = torch.Generator().manual_seed(3)
    state = {name: 0.1 * torch.randn(t.shape, generator=draw) for name, t in client.model.state().items()}
    conflict = {name: torch.rand(t.shape, generator=draw) for name, t in state.items()}
    return Broadcast(2, state, JOB, {"conflict": conflict}, all_seeds=SEEDS)


def run(pool, broadcast):
    return {answer.client_id: loaded(answer) for answer in pool.run(broadcast, CLIENTS)}


def assert_same(left, right):
    for client in CLIENTS:
        assert isinstance(left[client], ClientUpdate), left[client]
        for name, tensor in left[client].delta.items():
            assert torch.equal(tensor, right[client].delta[name])
        for field in ("num_examples", "num_tokens", "train_loss", "regularizer_loss", "round"):
            assert getattr(left[client], field) == getattr(right[client], field)


def test_one_two_and_three_workers_give_the_bits_of_this_process(setup, client, broadcast, tmp_path):
    remote = setup.remote([])
    here = run(Engine.by_name("in_process")(threads=1).start(lambda: client, remote, tmp_path), broadcast)
    assert all(any(t.any() for t in update.delta.values()) for update in here.values())
    assert here["c"].regularizer_loss > 0
    pool = Engine.by_name("workers")(workers=1).start(lambda: client, remote, tmp_path / "pool")
    try:
        for count in (1, 2, 3):
            pool.size = count  # one more process joins those that run
            assert_same(here, run(pool, broadcast))
        assert len(pool.pids) == 3
    finally:
        pool.close()


def test_a_client_tells_how_far_it_has_come_and_its_bits_do_not_change(setup, client, broadcast, tmp_path, monkeypatch):
    monkeypatch.setattr(callbacks, "TELL_S", 0.0)
    engine = Engine.by_name("in_process")(threads=1)
    quiet = run(engine.start(lambda: client, setup.remote([]), tmp_path), broadcast)
    telling, told = engine.start(lambda: client, setup.remote([]), tmp_path), []
    telling.working = lambda number, name, share: told.append((number, name, share))
    assert_same(quiet, run(telling, broadcast))
    # Client c has four rows: two batches of two, twice.
    assert [share for number, name, share in told if (number, name) == (2, "c")] == [0.25, 0.5, 0.75, 1.0]


def test_a_client_opens_its_own_rows_alone(setup, client, broadcast, tmp_path):
    shutil.copy(rows_file(Path(setup.rows), "a/b"), tmp_path)  # no other client's file is there
    alone = replace(setup, rows=str(tmp_path)).client(client.model, load_tokenizer(setup.proxy))
    assert alone.train(broadcast.addressed_to("a/b"), "a/b").num_examples == 3
    logs = str(tmp_path / "kept/logs")
    with Attempt("c", broadcast.round, logs) as tried:
        tried.answered(alone.train(broadcast.addressed_to("c"), "c"))
    dropped = tried.answer
    assert isinstance(dropped, Dropped)
    log = tmp_path / "kept/logs" / f"{file_stem('c')}.log"
    assert dropped.reason == f"DataError; details in the client's log kept/logs/{log.name}"
    assert "with the rows of client 'c' cannot be read" in log.read_text()


def test_what_a_worker_is_told_names_neither_target_nor_other_secrets(setup):
    told = json.dumps(setup.remote([]).options)
    assert set(json.loads(told)) == set(LocalSetup.__dataclass_fields__)
    assert "target_sha256" not in told
    assert "layer_map" not in told


def test_a_deadline_ends_training_after_a_batch(client, broadcast):
    with pytest.raises(ClientError, match=r"the round's time is over; raise federation.round_timeout_s"):
        client.train(broadcast.addressed_to("c"), "c", deadline=0.0)
    assert client.train(broadcast.addressed_to("c"), "c", deadline=None).num_examples == 4
