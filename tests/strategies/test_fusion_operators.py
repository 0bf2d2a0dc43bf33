"""Fusion beyond plug-in: numbers by hand, nothing trained changes nothing, a user's own operator."""

from dataclasses import dataclass

import pytest
import torch

from fedproxy.errors import ConfigError, ModelError
from fedproxy.models import Decoder, LayerMap, state_sha256
from fedproxy.models.logit_offset import LogitOffsetModel
from fedproxy.strategies.fusion import Fusion
from fedproxy.strategies.fusion.interpolate import neighbours
from fedproxy.strategies.trainable.lora import Lora

KEPT = (0, 3)
UP = "model.layers.{}.mlp.up_proj.weight"


@pytest.fixture
def setting(make_model):
    """A target of four blocks, its proxy of blocks 0 and 3, and the layer map."""
    target = make_model("llama", layers=4)
    return target, Decoder.of(target).subset(KEPT), LayerMap(KEPT, state_sha256(target))


def tuned(proxy, **change):
    """Return the proxy's weights with up_proj of block 0 and 1 raised by first and second."""
    weights = dict(proxy.state_dict())
    for block, value in enumerate((change.get("first", 0.0), change.get("second", 0.0))):
        weights[UP.format(block)] = weights[UP.format(block)] + value
    return weights


def moved(target, fused):
    """Return the mean change of every block's up_proj."""
    own, new = target.state_dict(), fused.state_dict()
    return [float((new[UP.format(i)] - own[UP.format(i)]).mean()) for i in range(4)]


@pytest.mark.parametrize("name", sorted({*Fusion.names()} - {"none", "logit_offset"}))
def test_nothing_trained_gives_the_target_back_bit_for_bit(setting, name):
    target, proxy, layer_map = setting
    fused = Fusion.by_name(name)().fuse(target, proxy, dict(proxy.state_dict()), layer_map)
    assert state_sha256(fused) == state_sha256(target)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("plug_in", {}),
        ("plug_in", {"mode": "delta", "scale": 2.0}),
        ("task_vector", {"scale": 0.5}),
        ("interpolate", {}),
    ],
)
def test_an_untrained_adapter_leaves_negative_zeros(make_model, name, options):
    target = make_model("llama", layers=4)
    for block in range(4):  # 1, where interpolate puts a change, as well as the kept ones
        target.state_dict()[UP.format(block)][:2] = -0.0
    proxy, layer_map = Decoder.of(target).subset(KEPT), LayerMap(KEPT, state_sha256(target))
    after = Lora(r=2, alpha=4).attach(Decoder.of(target).subset(KEPT)).merged_weights()
    fused = Fusion.by_name(name)(**options).fuse(target, proxy, {**proxy.state_dict(), **after}, layer_map)
    assert state_sha256(fused) == state_sha256(target)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("plug_in", {"scale": 0.5}, [0.2, 0, 0, 0.35]),
        ("plug_in", {"mode": "delta", "scale": 2.0}, [0.8, 0, 0, 1.4]),
        ("plug_in", {"scale": 0.0}, [0, 0, 0, 0]),
        ("task_vector", {"scale": 0.5}, [0.2, 0, 0, 0.35]),
        ("task_vector", {"scale": [0.5, 2.0]}, [0.2, 0, 0, 1.4]),
        # block 1 is at 1/3 of the way from 0 to 3: .5 (2/3 .4 + 1/3 .7) = .25, block 2: .5 (1/3 .4 + 2/3 .7) = .3
        ("interpolate", {}, [0.4, 0.25, 0.3, 0.7]),
        ("interpolate", {"strength": 1.0}, [0.4, 0.5, 0.6, 0.7]),
        ("interpolate", {"strength": 0.0}, [0.4, 0, 0, 0.7]),
        ("none", {}, [0, 0, 0, 0]),
    ],
)
def test_changes_by_hand(setting, name, options, expected):
    target, proxy, layer_map = setting
    before_hash = state_sha256(target)
    fused = Fusion.by_name(name)(**options).fuse(target, proxy, tuned(proxy, first=0.4, second=0.7), layer_map)
    assert moved(target, fused) == pytest.approx(expected, abs=1e-6)
    assert state_sha256(target) == before_hash


def test_removed_ends_take_the_change_of_the_one_neighbour_they_have():
    blocks = {1: 0, 3: 1}  # kept places of the target and their proxy blocks
    assert neighbours(blocks, 0) == [(0, 1.0)]
    assert neighbours(blocks, 2) == [(0, 0.5), (1, 0.5)]
    assert neighbours(blocks, 5) == [(1, 1.0)]


def test_scale_leaves_what_distillation_changed_out_of_delta(setting):
    target, proxy, layer_map = setting
    distilled = tuned(proxy, first=0.3)
    after = {**distilled, UP.format(0): distilled[UP.format(0)] + 0.2}
    fuse = {mode: Fusion.by_name("plug_in")(mode=mode, scale=0.5).fuse for mode in ("replace", "delta")}
    # replace goes half of the way of .3 + .2, delta half of .2
    assert moved(target, fuse["replace"](target, distilled, after, layer_map))[0] == pytest.approx(0.25, abs=1e-6)
    assert moved(target, fuse["delta"](target, distilled, after, layer_map))[0] == pytest.approx(0.1, abs=1e-6)


def test_candidates_are_judged_and_equal_ones_go_to_the_first(setting):
    target, proxy, layer_map = setting
    after = tuned(proxy, first=0.4, second=0.7)
    fusion = Fusion.by_name("task_vector")(candidates=(0.0, 0.5, 1.0), per_block=True, rows=4)
    assert fusion.judged_texts == 4

    def judge(model):
        first, _, _, second = moved(target, model)
        return abs(first - 0.2) + abs(second - 0.69)  # best at scale .5 of the first block and 1 of the second

    chosen = fusion.settle(target, proxy, after, layer_map, judge)
    assert chosen.scale == (0.5, 1.0)
    assert chosen.judged_texts == 0
    assert moved(target, chosen.fuse(target, proxy, after, layer_map)) == pytest.approx([0.2, 0, 0, 0.7], abs=1e-6)
    flat = Fusion.by_name("task_vector")(candidates=(1.0, 0.5))
    assert flat.settle(target, proxy, after, layer_map, lambda model: 0.0).scale == 1.0


def test_none_ends_with_the_target_or_the_tuned_proxy(setting):
    target, proxy, layer_map = setting
    after = tuned(proxy, first=0.4)
    assert state_sha256(Fusion.by_name("none")().fuse(target, proxy, after, layer_map)) == state_sha256(target)
    own = Fusion.by_name("none")(result="proxy").fuse(target, proxy, after, layer_map)
    assert len(Decoder.of(own)) == 2
    assert all(torch.equal(tensor, after[name]) for name, tensor in own.state_dict().items())


def test_logit_offset_joins_three_models_and_changes_none(setting):
    target, proxy, layer_map = setting
    after = tuned(proxy, first=0.4)
    fused = Fusion.by_name("logit_offset")(alpha=0.5).fuse(target, proxy, after, layer_map)
    assert isinstance(fused, LogitOffsetModel)
    assert state_sha256(fused.target) == state_sha256(target)
    assert torch.equal(fused.tuned.state_dict()[UP.format(0)], after[UP.format(0)])
    assert state_sha256(fused.untuned) == state_sha256(proxy)
    ids = torch.tensor([[5, 9, 3]])
    expected = target(ids).logits + 0.5 * (fused.tuned(ids).logits - proxy(ids).logits)
    assert torch.allclose(fused(ids).logits, expected, atol=1e-5)
    with pytest.raises(ModelError, match=r"fusion.name=logit_offset needs the untuned proxy itself"):
        Fusion.by_name("logit_offset")().fuse(target, proxy.state_dict(), after, layer_map)


def test_a_users_operator_is_ten_lines(setting):
    @dataclass(frozen=True)
    class Clipped(Fusion, name="clipped"):
        """Adds the change, each value at most ``limit``."""

        limit: float = 0.3

        def combine(self, target, before, after):
            return target + (after - before).clamp(-self.limit, self.limit)

    target, proxy, layer_map = setting
    fused = Fusion.by_name("clipped")().fuse(target, proxy, tuned(proxy, first=0.4, second=-0.1), layer_map)
    assert moved(target, fused) == pytest.approx([0.3, 0, 0, -0.1], abs=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("plug_in", {"scale": -1.0}, r"fusion\.scale must be at least 0, got -1\.0"),
        ("logit_offset", {"alpha": -0.5}, r"fusion\.alpha must be at least 0"),
        ("interpolate", {"strength": 1.5}, r"fusion\.strength must be in \[0, 1\], got 1\.5"),
        ("task_vector", {"scale": []}, r"fusion\.scale must be a number of at least 0 or a list of such, got \[\]"),
        ("task_vector", {"scale": "all"}, r"fusion\.scale must be a number"),
        ("task_vector", {"candidates": (1.0, -1.0)}, r"fusion\.candidates must be numbers of at least 0"),
        ("task_vector", {"per_block": True}, r"fusion\.per_block must be false where candidates is empty, got True"),
        ("task_vector", {"rows": 0}, r"fusion\.rows must be at least 1"),
    ],
)
def test_options_out_of_range(name, options, message):
    with pytest.raises(ConfigError, match=message):
        Fusion.by_name(name)(**options)


def test_as_many_scales_as_proxy_blocks(setting):
    target, proxy, layer_map = setting
    with pytest.raises(ConfigError, match=r"fusion.scale must be one number or 2, one per proxy block, got 3"):
        Fusion.by_name("task_vector")(scale=[1, 1, 1]).fuse(target, proxy, tuned(proxy), layer_map)


def test_bfloat16_target_is_cast_once(setting):
    target, proxy, _ = setting
    target, proxy = target.to(torch.bfloat16), proxy.to(torch.bfloat16)
    layer_map = LayerMap(KEPT, state_sha256(target))
    before = proxy.state_dict()
    after = {**before, UP.format(0): before[UP.format(0)].float() + 3e-4}
    fused = Fusion.by_name("task_vector")(scale=0.5).fuse(target, proxy, after, layer_map)
    own = target.state_dict()[UP.format(0)].float()
    change = after[UP.format(0)] - before[UP.format(0)].float()
    assert torch.equal(fused.state_dict()[UP.format(0)], (own + 0.5 * change).to(torch.bfloat16))
