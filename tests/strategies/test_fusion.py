"""Plug-in: only kept blocks move, float32 accumulate and one cast, the parent is checked."""

import pytest
import torch

from fedproxy.errors import ModelError
from fedproxy.models import Decoder, LayerMap, state_sha256
from fedproxy.strategies.compression import Compressor
from fedproxy.strategies.fusion import Fusion
from fedproxy.strategies.trainable import Trainable

KEPT = (0, 3)


@pytest.fixture
def setting(make_model):
    target = make_model("llama", layers=4)
    proxy = Decoder.of(target).subset(KEPT)
    return target, proxy, LayerMap(KEPT, state_sha256(target))


@pytest.mark.parametrize("mode", ["replace", "delta"])
def test_nothing_trained_gives_the_target_back_bit_for_bit(setting, mode):
    target, proxy, layer_map = setting
    fused = Fusion.by_name("plug_in")(mode=mode).fuse(target, proxy, proxy, layer_map)
    assert state_sha256(fused) == state_sha256(target)
    assert fused is not target


@pytest.mark.parametrize("mode", ["replace", "delta"])
def test_tuned_lora_lands_in_its_own_blocks_and_nowhere_else(setting, mode):
    target, proxy, layer_map = setting
    before_hash = state_sha256(target)
    before = {name: tensor.clone() for name, tensor in proxy.state_dict().items()}
    lora = Trainable.by_name("lora")(r=2, alpha=6, modules=["q_proj", "down_proj"])
    model = lora.attach(proxy, torch.Generator().manual_seed(0))
    state = {n: torch.randn(t.shape, generator=torch.Generator().manual_seed(1)) for n, t in model.state().items()}
    model.load_state(state)
    after = {**before, **dict(model.merged_weights())}
    fused = Fusion.by_name("plug_in")(mode=mode).fuse(target, before, after, layer_map)
    own, new = target.state_dict(), fused.state_dict()
    moved = {name for name in own if not torch.equal(own[name], new[name])}
    expected = {
        f"model.layers.{index}.{module}.weight" for index in KEPT for module in ("self_attn.q_proj", "mlp.down_proj")
    }
    assert moved == expected
    # Eq (15) with an undistilled proxy: W + (alpha / r) B A, here alpha / r = 3
    a = state["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"]
    b = state["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"]
    name = "model.layers.3.self_attn.q_proj.weight"
    assert torch.allclose(new[name], own[name] + 3 * b @ a, atol=1e-5)
    assert state_sha256(target) == before_hash


def test_modes_differ_for_a_distilled_proxy_and_delta_without_training_is_the_target(setting):
    target, proxy, layer_map = setting
    name = "model.layers.1.mlp.up_proj.weight"
    distilled = {n: t.clone() for n, t in proxy.state_dict().items()}
    distilled[name] += 0.5  # what distillation changed
    tuned = {**distilled, name: distilled[name] + 0.25}  # what clients changed
    fuse = {mode: Fusion.by_name("plug_in")(mode=mode).fuse for mode in ("replace", "delta")}
    goal = "model.layers.3.mlp.up_proj.weight"
    own = target.state_dict()[goal]
    fused = {mode: call(target, distilled, tuned, layer_map).state_dict()[goal] for mode, call in fuse.items()}
    assert torch.allclose(fused["replace"], own + 0.75, atol=1e-6)
    assert torch.allclose(fused["delta"], own + 0.25, atol=1e-6)
    assert state_sha256(fuse["delta"](target, distilled, distilled, layer_map)) == state_sha256(target)


def test_bfloat16_target_is_cast_once(setting):
    target, _, _ = setting
    target = target.to(torch.bfloat16)
    layer_map = LayerMap(KEPT, state_sha256(target))
    proxy = Decoder.of(target).subset(KEPT)
    before = proxy.state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    change = torch.full(before[name].shape, 3e-4)
    fused = Fusion.by_name("plug_in")(mode="replace").fuse(
        target, before, {**before, name: before[name].float() + change}, layer_map
    )
    got = fused.state_dict()[name]
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, (target.state_dict()[name].float() + change).to(torch.bfloat16))


def test_another_target_is_refused(setting, make_model):
    _, proxy, layer_map = setting
    other = make_model("llama", layers=4, seed=1)
    with pytest.raises(ModelError, match=r"are not those that were compressed"):
        Fusion.by_name("plug_in")().fuse(other, proxy, proxy, layer_map)


def test_a_proxy_that_lacks_a_weight_is_refused(setting):
    target, proxy, layer_map = setting
    weights = dict(proxy.state_dict())
    del weights["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ModelError, match=r"proxy after tuning has no model.layers.1.mlp.up_proj.weight of shape"):
        Fusion.by_name("plug_in")().fuse(target, proxy, weights, layer_map)


def test_compress_then_fuse_is_the_identity_for_every_family(make_model):
    for family in ("qwen2", "gemma2", "gpt2", "opt"):
        target = make_model(family, layers=4)
        ids = torch.arange(3, 9)[None]
        proxy, layer_map = Compressor.by_name("block_influence")(ratio=0.5).compress(target, [ids])
        fused = Fusion.by_name("plug_in")().fuse(target, proxy, proxy, layer_map)
        assert state_sha256(fused) == state_sha256(target)
        assert torch.equal(fused(ids).logits, target(ids).logits)
