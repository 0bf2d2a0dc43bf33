"""Clients that are never merged: their tensors side by side, and each round as if every client were alone."""

import pytest
import torch

from fedproxy.federation.checkpoint import CheckpointFolder, Progress
from fedproxy.federation.client_store import ClientStore
from fedproxy.federation.loop import Federation
from fedproxy.federation.separate import own, spread
from fedproxy.protocol import ClientUpdate
from fedproxy.strategies.aggregators import Aggregator
from fedproxy.strategies.regularizers import Regularizer
from fedproxy.strategies.server_optimizers import ServerOptimizer


class Adding:
    """Every client's update adds its number; ``clients`` is how many of them."""

    numbers = {"a": 1.0, "b": 2.0, "c": 4.0}

    def run(self, broadcast, client_ids, *, timeout_s=None):
        for client in client_ids:
            delta = {name: torch.full_like(tensor, self.numbers[client]) for name, tensor in broadcast.state.items()}
            loss = float(broadcast.state["layer.weight"].sum())
            examples = int(self.numbers[client])
            yield ClientUpdate(client, delta, examples, num_tokens=1, train_loss=loss, round=broadcast.round)


def federation(folder, per_round="all", optimizer="none", **options):
    return Federation(
        clients=["a", "b", "c"], clients_per_round=per_round, aggregator=Aggregator.by_name("none")(),
        server_optimizer=ServerOptimizer.by_name(optimizer)(**options), job={}, lora_scaling=None, seed=0,
        regularizer=Regularizer.by_name("none")(), store=ClientStore(folder),
    )  # fmt: skip


def go(tmp_path, rounds, start=None, **options):
    begin = start or Progress(0, spread({"layer.weight": torch.zeros(2)}, ["a", "b", "c"]))
    return federation(tmp_path, **options).run(
        begin, rounds, Adding(), checkpoints=CheckpointFolder(tmp_path), journal=tmp_path / "rounds.jsonl"
    )


def test_names_are_taken_apart_at_the_first_slash():
    side_by_side = spread({"w": torch.ones(1), "momentum/w": torch.zeros(1)}, ["b", "a"])
    assert list(side_by_side) == ["a/w", "a/momentum/w", "b/w", "b/momentum/w"]
    assert list(own(side_by_side, "a")) == ["w", "momentum/w"]
    assert own(side_by_side, "momentum") == {}


def test_every_client_goes_on_from_its_own_state(tmp_path):
    progress = go(tmp_path, 3)
    # three rounds of its own number each, never another's
    assert {key: tensor.tolist() for key, tensor in progress.state.items()} == {
        "a/layer.weight": [3.0, 3.0], "b/layer.weight": [6.0, 6.0], "c/layer.weight": [12.0, 12.0],
    }  # fmt: skip


def test_the_round_has_one_record(tmp_path):
    record = go(tmp_path, 2).records[1]
    assert record["round"] == 2
    assert record["clients"] == ["a", "b", "c"]
    # in round 2 client k starts at (k, k), so its loss is 2 k: (1*2 + 2*4 + 4*8) / 7
    assert record["train_loss"] == 6.0
    assert record["update_norms"] == pytest.approx([2**0.5, 8**0.5, 32**0.5])
    assert record["upload_bytes"] == 3 * 2 * 4
    assert "cosine" not in record


def test_who_is_not_drawn_keeps_its_state(tmp_path):
    progress = go(tmp_path, 1, per_round=1)
    (drawn,) = progress.records[0]["clients"]
    moved = {client for client in Adding.numbers if own(progress.state, client)["layer.weight"].any()}
    assert moved == {drawn}


def test_server_optimizers_keep_a_memory_per_client_and_resume_is_exact(tmp_path):
    options = {"optimizer": "sgd", "momentum": 0.5}
    whole = go(tmp_path / "whole", 4, **options)
    go(tmp_path / "parts", 2, **options)
    again = go(tmp_path / "parts", 4, start=CheckpointFolder(tmp_path / "parts").load_latest(), **options)
    assert whole.server_memory
    for group in ("state", "server_memory"):
        left, right = getattr(whole, group), getattr(again, group)
        assert sorted(left) == sorted(right)
        assert all(torch.equal(left[key], right[key]) for key in left)
    assert [record["round"] for record in again.records] == [1, 2, 3, 4]
