"""The emulator on its way from the server to the clients."""

from dataclasses import replace

import pytest
import torch

from fedproxy.data.tokenisation import Example
from fedproxy.errors import ClientError, ConfigError
from fedproxy.federation.client.memory import ClientMemory
from fedproxy.federation.client.site import Site
from fedproxy.federation.server.checkpoint import CheckpointFolder, Progress
from fedproxy.models import Decoder, LayerMap
from fedproxy.protocol import Broadcast
from fedproxy.seeding import ClientSeeds
from fedproxy.strategies.realignment import Material
from fedproxy.strategies.realignment.emulator import EmulatorRealignment
from fedproxy.strategies.round_parts.emulator import Aligner, Emulator, emulator_blocks, emulator_weights, receive
from fedproxy.strategies.trainable.lora import Lora
from tests.strategies.test_realignment import text

PI = (0, 2, 4)
JOB = {
    "lr": 1e-2, "batch_size": 2, "accumulate": 1, "epochs": 1, "weight_decay": 0.0, "max_grad_norm": 1.0,
    "regularizer": {"name": "none"}, "parts": [{"name": "emulator"}],
}  # fmt: skip


def make(make_model, blocks="last"):
    target = make_model("llama", layers=5).requires_grad_(False)
    model = Lora(r=2, blocks=blocks, last=1).attach(Decoder.of(target).subset(PI))
    return model, Material(target, LayerMap(PI, "0" * 64), text(), {"accelerator": "cpu"})


def make_aligner(make_model, **kwargs):
    model, material = make(make_model, **kwargs)
    return Aligner(EmulatorRealignment(steps=2, lr=1e-2), model, material, seed=3)


def equal(left, right):
    return sorted(left) == sorted(right) and all(torch.equal(left[name], right[name]) for name in left)


def test_the_emulator_is_every_block_without_a_trained_weight(make_model):
    assert emulator_blocks(make(make_model)[0]) == [0, 1]
    assert emulator_blocks(make(make_model, blocks=(1,))[0]) == [0, 2]
    names = emulator_weights(make(make_model)[0])
    assert {name.split(".")[2] for name in names} == {"0", "1"}
    assert all(name.startswith("model.layers.") for name in names)
    with pytest.raises(ConfigError, match=r"realignment.name=emulator needs blocks that no client trains, but all"):
        make_aligner(make_model, blocks="all")


def test_a_round_depends_on_the_round_before_and_not_on_what_the_model_held(make_model):
    first = make_aligner(make_model)
    start = first.model.state()
    one = first.align(1, start, {})
    two = first.align(2, start, one)
    again = make_aligner(make_model)  # a run that goes on after round 1
    assert equal(again.align(2, start, one), two)
    assert equal(again.align(1, start, {}), one)
    assert not equal(one, two)
    again.restore()
    assert equal(dict(emulator_weights(again.model)), dict(emulator_weights(make(make_model)[0])))


def test_a_checkpoint_keeps_it_to_the_bit(make_model, tmp_path):
    aligner = make_aligner(make_model)
    weights = aligner.align(1, aligner.model.state(), {})
    CheckpointFolder(tmp_path).save(Progress(1, aligner.model.state(), {"emulator": weights}))
    assert equal(CheckpointFolder(tmp_path).load_latest().remembered("emulator"), weights)


def test_a_client_elsewhere_trains_on_the_emulator_of_the_broadcast(make_model, tmp_path):
    aligner = make_aligner(make_model)
    state = aligner.model.state()
    plain = Broadcast(1, state, JOB, seeds=ClientSeeds.of(0, 1, "a"))
    aligned = Emulator(aligner).send(plain, {})
    weights = aligned.extras["emulator"]
    assert aligned.bytes - plain.bytes == sum(tensor.numel() * 4 for tensor in weights.values())
    aligned.save(tmp_path / "broadcast.safetensors")
    examples = {"a": [Example((5, 6, 7, 8), ((2, 4),), "x"), Example((9, 8, 7), ((1, 3),), "y")]}

    def train(broadcast, model):
        client = Site(model, examples, pad_id=0, trainer={"accelerator": "cpu"}, memory=ClientMemory(tmp_path))
        return client.train(broadcast, "a").delta

    sent = replace(Broadcast.load(tmp_path / "broadcast.safetensors"), seeds=aligned.seeds)
    elsewhere = train(sent, make(make_model)[0])
    assert equal(elsewhere, train(aligned, aligner.model))
    assert not equal(elsewhere, train(plain, make(make_model)[0]))


@pytest.mark.parametrize(
    ("name", "shape"),
    [("model.layers.2.mlp.up_proj.weight", (48, 32)), ("lm_head.weight", (61, 32)), ("model.layers.0.x", (1,))],
)
def test_a_foreign_emulator_is_refused_whole(name, shape, make_model):
    model, _ = make(make_model)
    before = {key: tensor.detach().clone() for key, tensor in emulator_weights(model).items()}
    sent = {**{key: tensor + 1 for key, tensor in before.items()}, name: torch.zeros(shape)}
    with pytest.raises(ClientError, match=rf"emulator has {name} of shape .*, which is no frozen weight of this proxy"):
        receive(model, sent)
    assert equal(dict(emulator_weights(model)), before)
