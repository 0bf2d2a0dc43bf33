"""What is put together after the last round: the mean of the tensors that clients kept to themselves."""

import weakref

import pytest
import torch

from fedproxy.errors import ClientError
from fedproxy.federation.server.asking import assemble
from fedproxy.federation.server.checkpoint import Progress
from fedproxy.federation.server.files import ServerFiles
from fedproxy.messages import Collect, Dropped, UpdateFile
from fedproxy.protocol import ClientUpdate
from fedproxy.strategies.aggregators import Aggregator, RoundContext
from fedproxy.strategies.trainable import Trainable

FedAvg, FedSA = (Aggregator.by_name(name)() for name in ("fedavg", "fedsa_lora"))


def personal(state):
    return [name for name in state if not FedSA.shares(name)]


class Handing:
    """Sites whose clients hand in given tensors, in a given order, in memory or as files."""

    def __init__(self, own, order=None, folder=None):
        self.own, self.order, self.folder = own, order, folder
        self.alive, self.most = weakref.WeakSet(), 0

    def ask(self, messages):
        assert all(messages[client] == Collect(progress(self.own).kept_by(client)) for client in messages)
        for client in self.order or messages:
            own = self.own[client]
            if isinstance(own, str):
                yield Dropped(client, own)
                continue
            answer = ClientUpdate(client, {name: Held(tensor) for name, tensor in own.items()})
            if self.folder is not None:
                answer.save(self.folder / client)
                answer = UpdateFile(client, self.folder / client)
            else:
                self.alive.update(answer.delta.values())
                self.most = max(self.most, len({id(tensor) for tensor in self.alive}))
            yield answer
            del answer


class Held(torch.Tensor):
    """A tensor that can be watched."""

    @staticmethod
    def __new__(cls, tensor):
        return tensor.clone().as_subclass(cls)

    __hash__ = object.__hash__


def progress(own, state=None, examples=None):
    """The progress after round 2, in which every client kept something."""
    kept = {
        client: {"round": 2, "seal": "ab" * 32, "examples": (examples or {}).get(client, 1), "tokens": 5}
        for client in own
    }
    return Progress(2, state or {}, kept=kept)


@pytest.fixture
def trainable(make_model):
    return Trainable.by_name("lora")(r=2, modules=["q_proj"]).attach(make_model("llama"))


@pytest.mark.parametrize("as_files", [False, True])
def test_the_fused_b_is_the_mean_over_clients_that_took_part_weighted_by_examples(trainable, tmp_path, as_files):
    state = trainable.state()
    own = {
        client: {name: torch.full_like(state[name], value) for name in personal(state)}
        for client, value in (("a", 1.0), ("b", 5.0))
    }
    sites = Handing(own, order=["b", "a"], folder=tmp_path if as_files else None)
    done = progress(own, state, {"a": 3, "b": 1})
    handed = assemble(trainable, done, FedSA, ServerFiles(tmp_path), sites, folder=tmp_path)
    # (3 * 1 + 1 * 5) / 4 = 2; two clients hand in B of 3 layers, 32 x 2 float32
    assert handed == 2 * 3 * 32 * 2 * 4
    for name, tensor in trainable.state().items():
        assert torch.equal(tensor, torch.full_like(tensor, 2.0) if name in personal(state) else state[name])
    assert list(tmp_path.iterdir()) == []  # what came as a file is taken in, and its place is empty


def test_the_mean_holds_one_client_at_a_time_and_has_the_bits_of_aggregation(trainable, tmp_path):
    state, draw = trainable.state(), torch.Generator().manual_seed(0)
    clients = [f"c{k:02d}" for k in range(40)]
    own = {c: {name: torch.randn(state[name].shape, generator=draw) for name in personal(state)} for c in clients}
    examples = {client: 1 + k for k, client in enumerate(clients)}
    updates = [
        ClientUpdate(c, {name: own[c][name] - state[name] for name in personal(state)}, examples[c]) for c in clients
    ]
    expected = FedSA.aggregate(updates, None, RoundContext(1), figures=False).delta
    sites = Handing(own)
    assemble(trainable, progress(own, state, examples), FedSA, ServerFiles(tmp_path), sites)
    assert sites.most <= 3 * len(personal(state))  # of 40: a client is let go of when the next one is there
    for name in personal(state):
        assert torch.equal(trainable.state()[name], state[name] + expected[name])


def test_a_client_whose_own_tensors_are_not_finite_is_named(trainable, tmp_path):
    state = trainable.state()
    own = {"a": {name: torch.full_like(state[name], float("nan")) for name in personal(state)}}
    with pytest.raises(ClientError, match=r"client 'a': tensor '.*lora_B.*' must be finite"):
        assemble(trainable, progress(own, state), FedSA, ServerFiles(tmp_path), Handing(own))


def test_a_client_whose_own_tensors_are_far_from_any_weight_is_named(trainable, tmp_path):
    state, by = trainable.state(), {"a": 1.0, "b": 3e3, "c": 1e30}
    own = {client: {name: state[name] + value for name in personal(state)} for client, value in by.items()}
    said = r"client 'c': tensor '.*lora_B.*' of its own has moved by 1e\+30, 1e\+06 is the most; have it"
    with pytest.raises(ClientError, match=said):
        assemble(trainable, progress(own, state), FedSA, ServerFiles(tmp_path), Handing(own))
    assert all(torch.equal(tensor, state[name]) for name, tensor in trainable.state().items())


def test_other_rules_put_nothing_together(trainable, tmp_path):
    state = {name: torch.full_like(tensor, 0.5) for name, tensor in trainable.state().items()}
    assert assemble(trainable, progress(["a"], state), FedAvg, ServerFiles(tmp_path), Handing({})) == 0
    assert all(torch.equal(tensor, state[name]) for name, tensor in trainable.state().items())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("as_files", [False, True])
@pytest.mark.parametrize("spoil", ["odd", "short", "none"])
def test_a_client_that_hands_in_other_tensors_of_its_own_is_named(trainable, tmp_path, spoil, as_files):
    state = trainable.state()
    right = {name: state[name] for name in personal(state)}
    spoilt = {
        "odd": {**right, "odd": torch.zeros(1)},
        "short": {name: tensor[:1] for name, tensor in right.items()},
        "none": {},
    }[spoil]
    sites = Handing({"a": spoilt}, folder=tmp_path if as_files else None)
    with pytest.raises(ClientError, match=r"client 'a' hands in other tensors of its own than the state has \(.*over"):
        assemble(trainable, progress(["a"], state), FedSA, ServerFiles(tmp_path), sites, folder=tmp_path)


def test_a_client_that_hands_in_nothing_is_named(trainable, tmp_path):
    state = trainable.state()
    with pytest.raises(ClientError, match=r"^client 'a' hands in no tensors: offline; mend that, then resume=auto$"):
        assemble(trainable, progress(["a"], state), FedSA, ServerFiles(tmp_path), Handing({"a": "offline"}))
