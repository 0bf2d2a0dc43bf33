"""What is put together after the last round: the mean of the tensors that clients kept to themselves."""

import weakref

import pytest
import torch

from fedproxy.errors import ClientError
from fedproxy.federation.client.memory import Memory
from fedproxy.federation.client.store import ClientStore
from fedproxy.federation.server.checkpoint import Progress
from fedproxy.federation.server.collecting import assemble
from fedproxy.protocol import ClientUpdate, TensorFile
from fedproxy.strategies.aggregators import Aggregator, RoundContext
from fedproxy.strategies.trainable import Trainable

FedAvg, FedSA = (Aggregator.by_name(name)() for name in ("fedavg", "fedsa_lora"))


def personal(state):
    return [name for name in state if not FedSA.shares(name)]


def test_the_fused_b_is_the_mean_over_clients_that_took_part_weighted_by_examples(make_model, tmp_path):
    trainable = Trainable.by_name("lora")(r=2, modules=["q_proj"]).attach(make_model("llama"))
    state, store = trainable.state(), ClientStore(tmp_path)
    own = personal(state)
    for client, value, examples in (("a", 1.0, 3), ("b", 5.0, 1)):
        kept = Memory({"personal": {name: torch.full_like(state[name], value) for name in own}}, num_examples=examples)
        store.memory.save(client, 2, kept)
    handed = assemble(trainable, Progress(2, state), FedSA, store, ["a", "b", "never drawn"])
    # (3 * 1 + 1 * 5) / 4 = 2; two clients hand in B of 3 layers, 32 x 2 float32
    assert handed == 2 * 3 * 32 * 2 * 4
    for name, tensor in trainable.state().items():
        assert torch.equal(tensor, torch.full_like(tensor, 2.0) if name in own else state[name])


def test_the_mean_holds_one_client_at_a_time_and_has_the_bits_of_aggregation(make_model, tmp_path, monkeypatch):
    trainable = Trainable.by_name("lora")(r=2, modules=["q_proj"]).attach(make_model("llama"))
    state, store = trainable.state(), ClientStore(tmp_path)
    own, draw = personal(state), torch.Generator().manual_seed(0)
    clients = [f"c{k:02d}" for k in range(40)]
    updates = []
    for k, client in enumerate(clients):
        kept = {name: torch.randn(state[name].shape, generator=draw) for name in own}
        store.memory.save(client, 1, Memory({"personal": kept}, num_examples=1 + k))
        updates.append(ClientUpdate(client, {name: kept[name] - state[name] for name in own}, 1 + k))
    expected = FedSA.aggregate(updates, None, RoundContext(1), figures=False).delta
    alive, most = weakref.WeakSet(), []
    load = type(store.memory).load

    def watch(self, *arguments, **named):
        memory = load(self, *arguments, **named)
        alive.add(memory.parts["personal"])
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
    own = {name: torch.full_like(state[name], float("nan")) for name in personal(state)}
    store.memory.save("a", 1, Memory({"personal": own}, num_examples=1))
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
    spoilt = spoil or {name: state[name][:1] for name in personal(state)}
    store.memory.save("a", 2, Memory({"personal": spoilt}, num_examples=3))
    with pytest.raises(ClientError, match=r"client 'a' hands in other tensors of its own than the state has"):
        assemble(trainable, Progress(2, state), FedSA, store, ["a"])
