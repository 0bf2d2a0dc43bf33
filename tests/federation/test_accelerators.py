"""A client on an accelerator: mixed precision, gradient checkpointing, and where the engine ``workers`` places it.

Each test also runs on the CPU, so that what it checks is known to hold somewhere.
"""

from collections import Counter
from dataclasses import asdict, replace

import pytest
import torch

from fedproxy.data.assets import resolve
from fedproxy.data.partition.rows import ClientRows
from fedproxy.data.rows import Row
from fedproxy.federation.client.setup import LocalSetup, load
from fedproxy.federation.client.site import Site
from fedproxy.federation.engines import Engine, RemoteClient
from fedproxy.models import Decoder
from fedproxy.protocol import Broadcast, ClientUpdate
from fedproxy.seeding import ClientSeeds

from .engines.doubles import loaded

JOB = {
    "lr": 0.01, "batch_size": 5, "accumulate": 1, "epochs": 1, "weight_decay": 0.0, "max_grad_norm": 1.0,
    "regularizer": {"name": "none"}, "frozen": [],
}  # fmt: skip
DEVICES = ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def setup(request, tmp_path):
    """How a client with ten rows is made: on the CPU, or on the first CUDA device."""
    if request.param == "gpu" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    rows = [Row("How much?\nAnswer:", f" {i} and {i + 1}", "made_up", f"made_up/train/{i}") for i in range(10)]
    ClientRows({"ann": rows, "bob": rows[:5]}, tmp_path / "rows")
    return LocalSetup(
        proxy=str(resolve("asset:tiny-llama")),
        dtype="float32",
        trainable={"name": "lora", "r": 2},
        rows=str(tmp_path / "rows"),
        store=str(tmp_path / "kept"),
        max_input_tokens=32,
        max_target_tokens=24,
        trainer={"accelerator": request.param, "devices": 1},
    )


def make(setup: LocalSetup, **trainer) -> tuple[Site, Counter]:
    """A client, and how often its first block's attention ran on which device, and its queries came in which dtype."""
    client = load(device=None, **asdict(replace(setup, trainer={**setup.trainer, **trainer})))
    seen: Counter = Counter()
    block = Decoder.of(client.model.model).blocks[0]
    # Inside a block, whose own hooks lie outside of what checkpointing computes again; and before the module, since
    # that stops at the last tensor that it needs.
    attention = block.self_attn
    attention.register_forward_pre_hook(lambda module, *_: seen.update([next(module.parameters()).device.type]))
    attention.q_proj.register_forward_hook(lambda *args: seen.update([args[2].dtype]))
    return client, seen


def broadcast(client: Site, **job) -> Broadcast:
    """A state in which B is not zero."""
    draw = torch.Generator().manual_seed(3)
    state = {name: 0.1 * torch.randn(t.shape, generator=draw) for name, t in sorted(client.initial.items())}
    seeds = {client: ClientSeeds.of(7, 1, client) for client in ("ann", "bob")}
    return Broadcast(1, state, job={**JOB, **job}, all_seeds=seeds)


def flat(update: ClientUpdate) -> torch.Tensor:
    assert all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in update.delta.values())
    return torch.cat([update.delta[name].flatten() for name in sorted(update.delta)])


def apart(update: ClientUpdate, known: ClientUpdate) -> float:
    """|update - known| / |known|, over all tensors."""
    return float((flat(update) - flat(known)).norm() / flat(known).norm())


def where(setup: LocalSetup) -> str:
    return "cpu" if setup.trainer["accelerator"] == "cpu" else "cuda"


def test_a_step_in_mixed_precision_is_near_that_in_float32(setup):
    whole, _ = make(setup)
    mixed, seen = make(setup, precision="bf16-mixed")
    given = broadcast(whole)
    exact, found = (
        whole.train(given.addressed_to("bob"), "bob"),
        mixed.train(given.addressed_to("bob"), "bob"),
    )  # five rows: one step
    assert set(seen) == {where(setup), torch.bfloat16}
    assert torch.isfinite(flat(found)).all()
    # bfloat16 keeps eight bits: a loss to a few parts in a thousand. AdamW's first step has the gradient's signs, which
    # rounding turns where a gradient is near zero.
    assert found.train_loss == pytest.approx(exact.train_loss, rel=1e-2)
    assert torch.cosine_similarity(flat(found), flat(exact), dim=0) > 0.9
    assert not torch.equal(flat(found), flat(exact))


def test_gradients_with_checkpointing_are_those_without(setup):
    client, seen = make(setup)
    kept = client.train(broadcast(client).addressed_to("ann"), "ann")
    calls = seen.pop(where(setup))
    again = client.train(broadcast(client, gradient_checkpointing=True).addressed_to("ann"), "ann")
    assert seen[where(setup)] == 2 * calls  # every block ran a second time, backward
    assert apart(again, kept) < 1e-3  # AdamW would turn a wrong gradient into steps of the learning rate, about 1
    assert again.train_loss == pytest.approx(kept.train_loss, rel=1e-6)


class Noting:
    """A client that sends with its update where it was trained: the index of the accelerator, -1 for the CPU."""

    def __init__(self, client: Site) -> None:
        self.client = client
        self.places: set[int] = set()
        Decoder.of(client.model.model).blocks[0].register_forward_hook(self._note)

    def _note(self, module, *_) -> None:
        device = next(module.parameters()).device
        self.places.add(-1 if device.type == "cpu" else device.index)

    def train(self, broadcast, client_id, **options) -> ClientUpdate:
        update = self.client.train(broadcast, client_id, **options)
        return replace(update, extras={"trained_on": {"index": torch.tensor(sorted(self.places))}})


def noting(*, device: int | None, **options) -> Noting:
    return Noting(load(device=device, **options))


@pytest.mark.slow
def test_a_worker_trains_on_the_first_device(setup, tmp_path):
    plain = setup.remote([])
    assert list(plain.devices) == list(range(torch.cuda.device_count() if where(setup) == "cuda" else 0))
    remote = RemoteClient(f"{__name__}:noting", asdict(setup), [], plain.devices)
    here = load(device=None, **asdict(setup))
    given = broadcast(here)
    pool = Engine.by_name("workers")(workers=1).start(lambda: here, remote, tmp_path / "exchange")
    try:
        updates = {update.client_id: loaded(update) for update in pool.run(given, ["ann", "bob"])}
    finally:
        pool.close()
    for client in ("ann", "bob"):
        assert updates[client].extras["trained_on"]["index"].tolist() == [0 if where(setup) == "cuda" else -1]
        assert apart(updates[client], here.train(given.addressed_to(client), client)) < 1e-3
