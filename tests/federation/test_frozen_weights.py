"""Changes of the frozen weights reach every model once, in the order of rounds, whenever it was loaded."""

import json

import pytest
import torch
from peft import PeftModel

from fedproxy.errors import CheckpointError, ModelError
from fedproxy.strategies.round_parts.base_change import BaseChanges
from fedproxy.strategies.trainable import Trainable

NAME = "base_model.model.model.layers.1.mlp.down_proj"
A, B = f"{NAME}.lora_A.weight", f"{NAME}.lora_B.weight"
WEIGHT = "model.layers.1.mlp.down_proj.weight"  # (32, 48)
SCALE = 3.0  # alpha / r = 6 / 2


def attach(model):
    return Trainable.by_name("lora")(r=2, alpha=6, modules=["down_proj"]).attach(model)


def change(seed, rank=3):
    rng = torch.Generator().manual_seed(seed)
    return {A: torch.randn(rank, 48, generator=rng), B: torch.randn(32, rank, generator=rng)}


def frozen(trainable):
    return trainable.layers()["model.layers.1.mlp.down_proj"].get_base_layer().weight.detach()


def test_a_model_loaded_later_catches_up_to_the_same_bits(make_model, tmp_path):
    changes, early, late = BaseChanges(tmp_path), attach(make_model("llama")), attach(make_model("llama"))
    start = frozen(early).clone()
    for round_ in (1, 2, 3):
        changes.receive(early, round_, change(round_))
    BaseChanges(tmp_path).receive(late, 3, change(3))
    assert torch.equal(frozen(early), frozen(late))
    assert early.frozen_round == late.frozen_round == 3
    exact = start + SCALE * sum(change(k)[B] @ change(k)[A] for k in (1, 2, 3))
    torch.testing.assert_close(frozen(early), exact, rtol=1e-5, atol=1e-5)
    changes.receive(early, 3, change(3))  # a second client of the round brings the same change
    assert torch.equal(frozen(early), frozen(late))


def test_a_change_that_was_never_received_is_an_error(make_model, tmp_path):
    with pytest.raises(CheckpointError, match=r"frozen weights in .*round_0001.* cannot be used: No such file"):
        BaseChanges(tmp_path).receive(attach(make_model("llama")), 2, change(2))


def test_what_an_earlier_run_received_gives_way_to_what_comes_now(make_model, tmp_path):
    BaseChanges(tmp_path).receive(attach(make_model("llama")), 1, change(7))
    model, right = attach(make_model("llama")), attach(make_model("llama"))
    BaseChanges(tmp_path).receive(model, 1, change(1))
    right.add_to_frozen(change(1))
    assert torch.equal(frozen(model), frozen(right))
    seals = [BaseChanges(tmp_path).files.seal(1)]
    written = (tmp_path / "round_0001.safetensors").stat().st_mtime_ns
    BaseChanges(tmp_path).receive(attach(make_model("llama")), 1, change(1))
    assert (tmp_path / "round_0001.safetensors").stat().st_mtime_ns == written  # the same is left alone
    BaseChanges(tmp_path).receive(right, 2, change(2))
    seals.append(BaseChanges(tmp_path).files.seal(2))
    assert len({"", *seals}) == 3


def test_half_precision_weights_are_rounded_once_from_the_exact_sum(make_model):
    trainable = attach(make_model("llama").to(torch.bfloat16))
    start = frozen(trainable).float()
    small = {
        A: torch.full((1, 48), 1e-3),
        B: torch.full((32, 1), 1 / SCALE),
    }  # 0.001 everywhere, below bf16's step at 1
    for _ in range(200):
        trainable.add_to_frozen(small)
    torch.testing.assert_close(frozen(trainable), (start + 0.2).to(torch.bfloat16))
    merged = trainable.merged_weights()[WEIGHT]
    torch.testing.assert_close(merged, start + 0.2, rtol=1e-5, atol=1e-5)


def test_a_gpt2_weight_is_stored_transposed(make_model):
    trainable = Trainable.by_name("lora")(r=2, alpha=6, modules=["c_fc"]).attach(make_model("gpt2"))
    layer = trainable.layers()["transformer.h.0.mlp.c_fc"]
    start = layer.get_base_layer().weight.detach().clone()  # (in, out)
    a, b = torch.randn(1, start.shape[0]), torch.randn(start.shape[1], 1)
    name = "base_model.model.transformer.h.0.mlp.c_fc"
    trainable.add_to_frozen({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b})
    torch.testing.assert_close(layer.get_base_layer().weight.detach(), start + SCALE * (b @ a).T)


def test_the_adapter_holds_what_was_moved(make_model, tmp_path):
    trainable = attach(make_model("llama"))
    trainable.load_state({name: torch.full_like(tensor, 0.1) for name, tensor in trainable.state().items()})
    both = [name for name in trainable.state() if name.endswith("lora_B.weight")]
    moved = {}
    for index, name in enumerate(both):  # every module gets a change, as from a round
        part = change(index)
        moved |= {name: part[B], name.replace("lora_B", "lora_A"): part[A]}
    trainable.add_to_frozen(moved)
    wanted = {name: weight.clone() for name, weight in trainable.merged_weights().items()}
    trainable.save_adapter(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 5
    loaded = PeftModel.from_pretrained(make_model("llama"), tmp_path).merge_and_unload().state_dict()
    for name, weight in wanted.items():
        torch.testing.assert_close(loaded[name], weight, rtol=1e-5, atol=1e-5)


def test_a_change_of_a_layer_that_is_not_adapted_is_an_error(make_model):
    other = {name.replace("down_proj", "up_proj"): tensor for name, tensor in change(1).items()}
    with pytest.raises(ModelError, match=r"no layer that .*up_proj.lora_B.weight could be added to; use trainable"):
        attach(make_model("llama")).add_to_frozen(other)
