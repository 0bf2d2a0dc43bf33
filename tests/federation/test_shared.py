"""The loop's part in what rules share: what a broadcast carries, what comes back, what is put together at the end."""

import weakref

import pytest
import torch

from fedproxy.errors import ClientError
from fedproxy.federation.checkpoint import Progress
from fedproxy.federation.client_memory import Memory
from fedproxy.federation.client_store import ClientStore
from fedproxy.federation.shared import assemble, broadcast_extras, merge_shared, own_tensors
from fedproxy.protocol import ClientUpdate, TensorFile
from fedproxy.strategies.aggregators import Aggregator, RoundContext
from fedproxy.strategies.regularizers import Regularizer
from fedproxy.strategies.trainable import Trainable

FedAvg, FedSA, Flora = (Aggregator.by_name(name)() for name in ("fedavg", "fedsa_lora", "flora"))
Scaffold, Plain = (Regularizer.by_name(name)() for name in ("scaffold", "none"))


def test_a_broadcast_carries_what_was_shared_and_what_was_moved():
    one = {"x": torch.ones(1)}
    first, later = Progress(0, one), Progress(1, one, shared_memory=one, frozen_change=one)
    assert broadcast_extras(first, Flora, Scaffold) == {}
    assert broadcast_extras(Progress(1, one), FedAvg, Plain) == {}
    assert sorted(broadcast_extras(later, Flora, Scaffold)) == ["frozen_change", "scaffold"]


def test_scaffolds_server_half_gains_the_changes_over_all_clients():
    progress = Progress(1, {}, shared_memory={"x": torch.tensor([1.0])})
    updates = [ClientUpdate(f"c{k}", {}, extras={"scaffold": {"x": torch.tensor([2.0 * k])}}) for k in (1, 2)]
    # c + (2 + 4) / 8 clients
    assert merge_shared(progress, Scaffold, updates, clients=8)["x"].tolist() == [1.75]
    assert merge_shared(progress, Plain, updates, clients=8) == {}


def test_an_update_without_the_clients_half_is_an_error():
    with pytest.raises(ClientError, match=r"client 'c0' must send extras\['scaffold'\] for regularizer .* got \[\]"):
        merge_shared(Progress(0, {}), Scaffold, [ClientUpdate("c0", {})], clients=1)


def test_own_tensors_are_those_that_a_rule_does_not_share():
    state = {"m.lora_A.weight": torch.zeros(1), "m.lora_B.weight": torch.zeros(1), "norm": torch.zeros(1)}
    assert own_tensors(state, FedSA) == ["m.lora_B.weight"]
    assert own_tensors(state, FedAvg) == []


def test_the_fused_b_is_the_mean_over_clients_that_took_part_weighted_by_examples(make_model, tmp_path):
    trainable = Trainable.by_name("lora")(r=2, modules=["q_proj"]).attach(make_model("llama"))
    state, store = trainable.state(), ClientStore(tmp_path)
    own = own_tensors(state, FedSA)
    for client, value, examples in (("a", 1.0, 3), ("b", 5.0, 1)):
        kept = Memory(own={name: torch.full_like(state[name], value) for name in own}, num_examples=examples)
        store.memory.save(client, 2, kept)
    handed = assemble(trainable, Progress(2, state), FedSA, store, ["a", "b", "never drawn"])
    # (3 * 1 + 1 * 5) / 4 = 2; two clients hand in B of 3 layers, 32 x 2 float32
    assert handed == 2 * 3 * 32 * 2 * 4
    for name, tensor in trainable.state().items():
        assert torch.equal(tensor, torch.full_like(tensor, 2.0) if name in own else state[name])


def test_the_mean_holds_one_client_at_a_time_and_has_the_bits_of_aggregation(make_model, tmp_path, monkeypatch):
    trainable = Trainable.by_name("lora")(r=2, modules=["q_proj"]).attach(make_model("llama"))
    state, store = trainable.state(), ClientStore(tmp_path)
    own, draw = own_tensors(state, FedSA), torch.Generator().manual_seed(0)
    clients = [f"c{k:02d}" for k in range(40)]
    updates = []
    for k, client in enumerate(clients):
        kept = {name: torch.randn(state[name].shape, generator=draw) for name in own}
        store.memory.save(client, 1, Memory(own=kept, num_examples=1 + k))
        updates.append(ClientUpdate(client, {name: kept[name] - state[name] for name in own}, 1 + k))
    expected = FedSA.aggregate(updates, None, RoundContext(1), figures=False).delta
    alive, most = weakref.WeakSet(), []
    load = type(store.memory).load

    def watch(self, *arguments, **named):
        memory = load(self, *arguments, **named)
        alive.add(memory.own)
        most.append(len(alive))
        return memory

    monkeypatch.setattr(TensorFile, "__hash__", object.__hash__)
    monkeypatch.setattr(type(store.memory), "load", watch)
    assemble(trainable, Progress(1, state), FedSA, store, clients)
    assert max(most) <= 3  # of 40: a client is let go of when the next one is there
    for name in own:
        assert torch.equal(trainable.state()[name], state[name] + expected[name])


def test_a_client_whose_own_tensors_are_not_finite_is_named(make_model, tmp_path):
    trainable = Trainable.by_name("lora")(r=2, modules=["q_proj"]).attach(make_model("llama"))
    state, store = trainable.state(), ClientStore(tmp_path)
    own = {name: torch.full_like(state[name], float("nan")) for name in own_tensors(state, FedSA)}
    store.memory.save("a", 1, Memory(own=own, num_examples=1))
    with pytest.raises(ClientError, match=r"client 'a': tensor '.*lora_B.*' must be finite"):
        assemble(trainable, Progress(1, state), FedSA, store, ["a"])


def test_other_rules_put_nothing_together(make_model, tmp_path):
    trainable = Trainable.by_name("lora")(r=2, modules=["q_proj"]).attach(make_model("llama"))
    state = {name: torch.full_like(tensor, 0.5) for name, tensor in trainable.state().items()}
    assert assemble(trainable, Progress(3, state), FedAvg, ClientStore(tmp_path), ["a"]) == 0
    assert all(torch.equal(tensor, state[name]) for name, tensor in trainable.state().items())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("spoil", [{"odd": torch.zeros(1)}, None])
def test_a_client_that_hands_in_other_tensors_of_its_own_is_named(make_model, tmp_path, spoil):
    trainable = Trainable.by_name("lora")(r=2, modules=["q_proj"]).attach(make_model("llama"))
    state, store = trainable.state(), ClientStore(tmp_path)
    spoilt = spoil or {name: state[name][:1] for name in own_tensors(state, FedSA)}
    store.memory.save("a", 2, Memory(own=spoilt, num_examples=3))
    with pytest.raises(ClientError, match=r"client 'a' hands in other tensors of its own than the state has"):
        assemble(trainable, Progress(2, state), FedSA, store, ["a"])
