"""Frozen weights in few bits; without bitsandbytes only the refusals run."""

import importlib.util
from dataclasses import asdict

import pytest
import torch

from fedproxy.data.assets import resolve
from fedproxy.data.partition.rows import ClientRows
from fedproxy.data.rows import Row
from fedproxy.errors import ConfigError
from fedproxy.federation.client.setup import LocalSetup, load
from fedproxy.models import load_model
from fedproxy.models.quantized import check_quantization, load_quantized
from fedproxy.protocol import Broadcast
from fedproxy.seeding import ClientSeeds
from fedproxy.strategies.trainable import Trainable

JOB = {
    "lr": 0.01, "batch_size": 4, "accumulate": 1, "epochs": 2, "weight_decay": 0.0, "max_grad_norm": 1.0,
    "regularizer": {"name": "none"},
}  # fmt: skip
installed = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"client.quantization=4bit needs bitsandbytes: pip install 'fedproxy\[quant"):
        check_quantization("4bit", "cuda")


def test_a_device_without_kernels_is_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(ConfigError, match=r"client.quantization=8bit runs on cuda, cpu, xpu, not on mps; set it to no"):
        check_quantization("8bit", "mps")
    check_quantization("8bit", "cuda")


@installed
@pytest.mark.parametrize(("bits", "near"), [("8bit", 0.02), ("4bit", 0.2)])
def test_logits_stay_near_those_of_the_whole_weights(bits, near):
    path, cpu = resolve("asset:tiny-llama"), torch.device("cpu")
    whole, small = load_model(path), load_quantized(path, bits, dtype=torch.float32, device=cpu)
    ids = torch.arange(24).view(2, 12)
    expected, found = whole(input_ids=ids).logits, small(input_ids=ids).logits
    assert 0 < (found - expected).norm() / expected.norm() < near
    layer = small.model.layers[0].mlp.up_proj.weight
    bytes_of = layer.numel() * layer.element_size()
    assert bytes_of * {"8bit": 4, "4bit": 8}[bits] == whole.model.layers[0].mlp.up_proj.weight.numel() * 4
    assert not any(parameter.requires_grad for parameter in small.parameters())


@installed
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_gradients_are_those_of_the_rounded_weights(bits):
    """Against plain layers that hold what the quantised ones stand for."""
    import bitsandbytes

    path = resolve("asset:tiny-llama")
    small = load_quantized(path, bits, dtype=torch.float32, device=torch.device("cpu"))
    whole = load_model(path)
    for name, module in small.named_modules():
        if bits == "4bit" and isinstance(module, bitsandbytes.nn.Linear4bit):
            rounded = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif bits == "8bit" and isinstance(module, bitsandbytes.nn.Linear8bitLt):
            rounded = module.weight.CB.float() * module.weight.SCB[:, None] / 127
        else:
            continue
        whole.get_submodule(name).weight.data.copy_(rounded)
    draw, ids = torch.Generator().manual_seed(0), torch.arange(26).view(2, 13)
    state, gradients = {}, []
    for model in (small, whole):
        tuned = Trainable.by_name("lora")(r=2).attach(model)  # runs the model once in evaluation mode
        state = state or {name: 0.1 * torch.randn(t.shape, generator=draw) for name, t in tuned.state().items()}
        tuned.load_state(state)
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in tuned.parameters().values()]))
    assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[1].norm()


def client(tmp_path, device, **trainer):
    rows = [Row("How much?\nAnswer:", f" {i} and {i + 1}", "made_up", f"made_up/train/{i}") for i in range(8)]
    ClientRows({"ann": rows}, tmp_path / "rows")
    setup = LocalSetup(
        proxy=str(resolve("asset:tiny-llama")), dtype="float32", trainable={"name": "lora", "r": 2},
        rows=str(tmp_path / "rows"), store=str(tmp_path / "kept"), max_input_tokens=32, max_target_tokens=24,
        trainer=trainer, quantization="4bit",
    )  # fmt: skip
    return load(device=device, **asdict(setup))


def check_two_rounds(made):
    """Train twice from one state: the frozen weights must be as usable the second time, and the loss falls."""
    first = made.train(Broadcast(1, made.initial, job=JOB, seeds=ClientSeeds.of(7, 1, "ann")), "ann")
    again = made.train(Broadcast(1, made.initial, job=JOB, seeds=ClientSeeds.of(7, 1, "ann")), "ann")
    assert all(torch.equal(first.delta[name], again.delta[name]) for name in first.delta)
    moved = {name: tensor + first.delta[name] for name, tensor in made.initial.items()}
    assert (
        made.train(Broadcast(2, moved, job=JOB, seeds=ClientSeeds.of(7, 2, "ann")), "ann").train_loss < first.train_loss
    )
    assert all(tensor.dtype == torch.float32 for tensor in first.delta.values())


@installed
def test_a_client_tunes_on_four_bits(tmp_path):
    check_two_rounds(client(tmp_path, None, accelerator="cpu"))


@installed
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_client_tunes_on_four_bits_on_a_gpu(tmp_path):
    check_two_rounds(client(tmp_path, 0, accelerator="gpu"))
