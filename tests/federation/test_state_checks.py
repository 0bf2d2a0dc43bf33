"""A round whose result nobody could go on from is not saved, and the line says whose fault it is."""

import math

import pytest
import torch

from fedproxy.errors import ClientError
from fedproxy.federation.server.checkpoint import CheckpointFolder, Progress
from fedproxy.federation.server.files import ServerFiles
from fedproxy.federation.server.loop import Federation
from fedproxy.federation.server.participation import Participation
from fedproxy.federation.server.state_checks import largest
from fedproxy.protocol import ClientUpdate
from fedproxy.strategies.aggregators import Aggregator
from fedproxy.strategies.server_optimizers import ServerOptimizer


@pytest.fixture(autouse=True)
def let_in(monkeypatch):
    """Let every finite update in: what is looked at here is the state that comes of it."""
    monkeypatch.setattr("fedproxy.federation.server.update_checks.LARGEST_CHANGE", math.inf)


NAME = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
PAIR = NAME.replace("lora_A", "lora_B")


class Sending:
    """Every client's update holds the number that ``values`` has for it."""

    def __init__(self, **values):
        self.values = values

    def run(self, broadcast, client_ids, *, timeout_s=None):
        for client in client_ids:
            state = broadcast.addressed_to(client).state
            delta = {name: torch.full_like(tensor, self.values[client]) for name, tensor in state.items()}
            yield ClientUpdate(client, delta, 1, num_tokens=1, train_loss=1.0, round=broadcast.round)


def go(folder, engine, *, rule="fedavg", optimizer="none", ratio=1000.0, rounds=1, **options):
    clients = sorted(engine.values)
    federation = Federation(
        clients=clients, clients_per_round="all", aggregator=Aggregator.by_name(rule)(**options),
        server_optimizer=ServerOptimizer.by_name(optimizer)(), job={}, lora_scaling=2.0, seed=0,
        parts=(), files=ServerFiles(folder),
        participation=Participation(len(clients), max_norm_ratio=ratio),
    )  # fmt: skip
    start = {NAME: torch.ones(2, 4), PAIR: torch.zeros(4, 2)}
    return federation.run(
        Progress(0, start), rounds, engine, checkpoints=CheckpointFolder(folder), journal=folder / "rounds.jsonl"
    )


@pytest.mark.parametrize("values", [{"a": 3e38}, {"a": 0.0, "b": 3e38}, {"a": 2e6}])
@pytest.mark.parametrize("ratio", [1000.0, None])
def test_a_finite_update_without_peers_is_not_checkpointed(tmp_path, values, ratio):
    with pytest.raises(ClientError, match=r"round 1 is not saved: the state .*; .* resume=auto goes on after round 0"):
        go(tmp_path, Sending(**values), ratio=ratio)
    assert CheckpointFolder(tmp_path).rounds() == []
    assert (tmp_path / "rounds.jsonl").read_text() == ""


def test_the_state_may_grow_a_thousandfold_and_no_more(tmp_path):
    # the start is 8 ones: norm sqrt(8). Every one of 16 coordinates moved by v gives about 4 v: 2828 is 1000 sqrt(8)
    go(tmp_path / "in", Sending(a=700.0))
    with pytest.raises(ClientError, match=r"from 2.83 to 2.[89]\de\+03, federation.max_norm_ratio allows 1000"):
        go(tmp_path / "out", Sending(a=720.0))
    go(tmp_path / "free", Sending(a=720.0), ratio=None)


RULES = [name for name in Aggregator.names() if not Aggregator.by_name(name).needs_extras]


BOUNDING = ("centered_clipping", "norm_bound", "consensus")
"""Rules that clip, and one that finds no coordinate on which clients agree: what they return is small."""


@pytest.mark.parametrize("rule", RULES)
def test_no_rule_saves_nan_infinity_or_what_overflows(tmp_path, rule):
    engine = Sending(**dict.fromkeys("abcdefgh", 3e38))
    if rule in BOUNDING:
        assert max(map(largest, go(tmp_path, engine, rule=rule, ratio=None).state.values())) < 2.0
        return
    with pytest.raises(
        ClientError,
        match=r"gives NaN or infinity for|round 1 is not saved: .*(NaN or infinity in tensor|1e\+06 is the most)",
    ) as caught:
        go(tmp_path, engine, rule=rule, ratio=None)
    if "NaN" in str(caught.value):
        assert f"aggregator.name={rule}" in str(caught.value)
    assert CheckpointFolder(tmp_path).rounds() == []


@pytest.mark.parametrize("optimizer", ServerOptimizer.names())
def test_no_server_optimizer_does_either(tmp_path, optimizer):
    with pytest.raises(
        ClientError, match=r"round 1 is not saved: .*(server_optimizer.name=|the state would hold|norm)"
    ):
        go(tmp_path, Sending(a=1e30), optimizer=optimizer)


def test_what_stays_with_clients_that_are_never_merged_is_checked_too(tmp_path):
    with pytest.raises(ClientError, match=r"round 1 is not saved: .*longest update: client 'b'"):
        go(tmp_path, Sending(a=0.5, b=3e38), rule="none", ratio=None)
    assert CheckpointFolder(tmp_path).rounds() == []


def test_largest_sees_every_kind_of_number():
    assert largest(torch.tensor([1.0, -3.0])) == 3.0
    assert largest(torch.zeros(0)) == 0.0
    assert largest(torch.tensor([1, 2])) == 0.0
    assert math.isnan(largest(torch.tensor([1.0, float("nan")])))
    assert not math.isfinite(largest(torch.tensor([-float("inf"), 1.0])))
    assert largest(torch.tensor([2.0], dtype=torch.bfloat16)) == 2.0
