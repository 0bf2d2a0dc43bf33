"""Two processes with gloo train a client as one process does: ddp and fsdp against the plain client."""

import os
import signal
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from fedproxy.data.assets import resolve
from fedproxy.data.partition.rows import ClientRows
from fedproxy.data.rows import Row
from fedproxy.errors import CheckpointError
from fedproxy.federation.client.memory import ClientMemory
from fedproxy.federation.client.setup import LocalSetup, load
from fedproxy.federation.engines import Engine
from fedproxy.messages import Collect, Done, Dropped, Rewind
from fedproxy.protocol import Broadcast, Kept
from fedproxy.seeding import ClientSeeds

from .engines.doubles import loaded

JOB = {
    "lr": 0.01, "batch_size": 3, "accumulate": 1, "epochs": 2, "weight_decay": 0.0, "max_grad_norm": 1.0,
    "regularizer": {"name": "none"}, "frozen": [],
}  # fmt: skip
RESTING = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
OWN = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
JOBS = {
    "conflict, clipped and accumulated": {
        "regularizer": {"name": "conflict", "strength": 0.1},
        "parts": [{"name": "conflict"}],
        "accumulate": 2,
    },
    "scaffold, tensors that rest or stay": {
        "regularizer": {"name": "scaffold"},
        "frozen": [RESTING],
        "parts": [
            {"name": "control_variates", "regularizer": {"name": "scaffold"}},
            {"name": "personal", "tensors": [OWN]},
        ],
    },
    "proximal, recomputed": {"regularizer": {"name": "proximal", "strength": 0.5}, "gradient_checkpointing": True},
}


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """Ten rows of unequal answers in batches of three: parts are uneven, and one is empty."""
    folder = tmp_path_factory.mktemp("clients")
    rows = [
        Row("How much?\nAnswer:" * (1 + i % 2), f" {i} and {i + 1}" * (1 + i % 3), "made_up", f"made_up/train/{i}")
        for i in range(10)
    ]
    ClientRows({"ann": rows}, folder / "rows")
    return LocalSetup(
        proxy=str(resolve("asset:tiny-llama")),
        dtype="float32",
        trainable={"name": "lora", "r": 2},
        rows=str(folder / "rows"),
        store=str(folder / "kept"),
        max_input_tokens=32,
        max_target_tokens=24,
        trainer={"accelerator": "cpu", "devices": 1},
    )


@pytest.fixture(scope="module")
def alone(setup):
    return load(device=None, **asdict(replace(setup, store=setup.store + "_alone")))


class Group:
    """A client of several processes, as the one seat of an engine."""

    def __init__(self, remote, folder):
        self.strategy = remote.options["strategy"]
        self.pool = Engine.by_name("in_process")().start(lambda: None, remote, folder)

    def train(self, broadcast, client_id):
        (answer,) = self.pool.run(broadcast, [client_id])
        return answer

    def answer(self, message, client_id):
        (answer,) = self.pool.ask({client_id: message})
        return answer

    def close(self):
        self.pool.close()


def make_group(setup, folder, **trainer):
    """A client of two processes; starting them takes seconds."""
    trainer = {"accelerator": "cpu", "devices": 2, **trainer}
    return Group(replace(setup, trainer=trainer, store=f"{setup.store}_{trainer['strategy']}").remote([]), folder)


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def group(request, setup, tmp_path_factory):
    client = make_group(setup, tmp_path_factory.mktemp("exchange"), strategy=request.param)
    yield client
    client.close()


def broadcast(alone, job, round_=2):
    """A state in which B is not zero, a conflict map, and a job."""
    draw = torch.Generator().manual_seed(3)
    state = {name: 0.1 * torch.randn(t.shape, generator=draw) for name, t in sorted(alone.initial.items())}
    conflict = {name: torch.rand(t.shape, generator=draw) for name, t in state.items()}
    kept = {name for part in job.get("parts", ()) for name in part.get("tensors", ())}
    sent, known = ({n: t for n, t in tensors.items() if n not in kept} for tensors in (state, conflict))
    extras = {"conflict": known} if {"name": "conflict"} in job.get("parts", ()) else {}
    return Broadcast(round_, sent, {**JOB, **job}, extras, seeds=ClientSeeds.of(7, round_, "ann", 2))


def distance(left, right):
    """|left - right| / |right|, over all tensors."""
    assert list(left) == list(right)
    apart = sum(float((left[name] - right[name]).square().sum()) for name in right)
    return (apart / sum(float(tensor.square().sum()) for tensor in right.values())) ** 0.5


@pytest.mark.parametrize("job", list(JOBS))
def test_two_processes_do_what_one_does(job, setup, alone, group):
    given = broadcast(alone, JOBS[job])
    one, two = alone.train(given, "ann"), loaded(group.train(given, "ann"))
    # Float32 sums in another order, over a dozen AdamW steps; a wrong weight of one part would show at 1e-2.
    assert distance(two.delta, one.delta) < 1e-4
    assert (two.train_loss, two.regularizer_loss) == pytest.approx((one.train_loss, one.regularizer_loss), rel=1e-5)
    assert (two.num_examples, two.num_tokens, two.round) == (one.num_examples, one.num_tokens, one.round)
    assert bool(two.delta[RESTING].any()) != ("frozen" in JOBS[job])
    for part in one.extras:
        assert distance(two.extras[part], one.extras[part]) < 1e-4


def test_the_same_processes_give_the_same_bits_again(alone, group):
    given = broadcast(alone, JOBS["conflict, clipped and accumulated"])
    first, second = loaded(group.train(given, "ann")), loaded(group.train(given, "ann"))
    assert all(torch.equal(first.delta[name], second.delta[name]) for name in first.delta)


def test_what_a_client_remembers_is_written_once_and_read_by_all(setup, alone, group):
    job = JOBS["scaffold, tensors that rest or stay"]
    kept = {alone: Kept(), group: Kept()}
    for round_ in (2, 3):
        given = broadcast(alone, job, round_)
        one, two = (loaded(client.train(replace(given, kept=kept[client]), "ann")) for client in kept)
        kept = {alone: Kept(round_, one.seal), group: Kept(round_, two.seal)}
    assert distance(two.delta, one.delta) < 1e-4
    store = f"{setup.store}_{group.strategy}"
    mine = ClientMemory(Path(store)).load("ann", kept[group])
    known = ClientMemory(Path(setup.store + "_alone")).load("ann", kept[alone])
    assert sorted(mine) == ["control_variates", "personal"]
    assert all(distance(mine[part], known[part]) < 1e-4 for part in known)
    handed = loaded(group.answer(Collect(kept[group]), "ann"))
    assert distance(handed.delta, known["personal"]) < 1e-4
    assert group.answer(Rewind(2, Kept()), "ann") == Done("ann")
    with pytest.raises(CheckpointError, match=r"client 'ann' in .* cannot be used: No such file"):
        group.answer(Collect(kept[group]), "ann")


def test_statistics_of_the_rows_come_from_the_first_process(alone, group):
    if group.strategy == "fsdp":
        return  # refused before anything starts, see tests/pipeline/test_devices.py
    given = broadcast(alone, {"parts": [{"name": "statistics", "groups": ["fisher"]}]})
    one, two = alone.train(given, "ann"), loaded(group.train(given, "ann"))
    assert distance(two.extras["fisher"], one.extras["fisher"]) < 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_gpus_do_what_one_process_does(strategy, setup, alone, tmp_path):
    pair = make_group(setup, tmp_path, accelerator="gpu", strategy=strategy)
    given = broadcast(alone, JOBS["conflict, clipped and accumulated"])
    try:
        first, second = loaded(pair.train(given, "ann")), loaded(pair.train(given, "ann"))
    finally:
        pair.close()
    # Kernels of another device, over eight AdamW steps.
    assert distance(first.delta, alone.train(given, "ann").delta) < 1e-2
    assert distance(second.delta, first.delta) < 1e-4


@pytest.mark.slow
def test_a_process_that_stops_is_given_up_by_the_others(setup, alone, tmp_path):
    """The others wait in a step for patience_s; then the client is dropped with their words, and all are ended."""
    remote = replace(setup, trainer={"accelerator": "cpu", "devices": 2}).remote([])
    group = Group(replace(remote, options={**remote.options, "patience_s": 60.0}, logs=None), tmp_path)
    given = broadcast(alone, {})
    try:
        group.train(given, "ann")
        stopped = group.pool.pids[1]
        os.kill(stopped, signal.SIGSTOP)
        started = time.monotonic()
        assert group.train(given, "ann") == Dropped("ann", "process 1 of 2: RuntimeError; no log is kept")
        assert 50 < time.monotonic() - started < 150
        assert not os.path.exists(f"/proc/{stopped}")
    finally:
        group.close()
