import copy

import pytest
import torch

from fedproxy.errors import ConfigError, DataError, ModelError
from fedproxy.models import Decoder, LayerMap
from fedproxy.modules.losses import hidden_distance
from fedproxy.modules.teacher import observe
from fedproxy.strategies.compression.healing import HealingConfig, gaps, heal
from tests.strategies.compression.architectures import small_model, texts

KEPT = (0, 1, 3)
DOWN = {"llama": "mlp.down_proj", "gpt2": "mlp.c_proj", "opt": "fc2", "gpt_neox": "mlp.dense_4h_to_h"}


def layer_map(kept=KEPT, neurons=None):
    return LayerMap(tuple(kept), "0" * 64, neurons)


def cases(count=8):
    return [texts(seed=seed) for seed in range(count)]


def make_pair(family="llama", kept=KEPT):
    target = small_model(family)
    return Decoder.of(target).subset(kept), target


def error_behind(proxy, target, own, behind, batches):
    """Return the mean over all tokens of the relative squared error of one hidden state."""
    errors = []
    for batch in batches:
        mine, theirs = observe(proxy, batch, [own]), observe(target, batch, [behind])
        count = int(batch["attention_mask"].sum())
        errors.append((count, hidden_distance(mine[f"block_{own}"], theirs[f"block_{behind}"]).item()))
    return sum(count * error for count, error in errors) / sum(count for count, _ in errors)


def test_gaps_are_between_kept_blocks_and_behind_the_last():
    assert gaps(layer_map((0, 1, 3)), 6) == ((1, 2), (2, 5))
    assert gaps(layer_map((0, 1, 2)), 3) == ()
    assert gaps(layer_map((2, 3)), 4) == ()  # nothing stands before the first gap


@pytest.mark.parametrize("family", DOWN)
def test_one_projection_per_gap_changes_and_errors_are_those_of_the_model(family):
    proxy, target = make_pair(family)
    before, batches, frozen = copy.deepcopy(proxy.state_dict()), cases(), copy.deepcopy(target.state_dict())
    first = error_behind(proxy, target, 1, 2, batches)
    found = heal(proxy, target, batches, layer_map=layer_map(), ridge=0.01)
    assert [(gap.block, gap.removed) for gap in found] == [(1, 1), (2, 2)]
    assert found[0].before == pytest.approx(first, rel=1e-4)
    for gap, behind in zip(found, (2, 5), strict=True):
        assert gap.after < 0.9 * gap.before
        assert gap.after == pytest.approx(error_behind(proxy, target, gap.block, behind, batches), rel=1e-3)
    changed = {name for name, tensor in proxy.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{Decoder.of(proxy).prefix}.{own}.{DOWN[family]}.weight" for own in (1, 2)}
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in target.state_dict().items())


def test_every_pass_over_a_batch_is_told():
    proxy, target = make_pair()
    told = []
    heal(proxy, target, cases(2), layer_map=layer_map(), ridge=0.01, advance=lambda *parts: told.append(parts))
    assert told == [(done, 6) for done in range(1, 7)]  # 2 batches: once through the target, once for each of 2 gaps


def test_weights_equal_a_ridge_regression_on_stacked_rows():
    proxy, target = make_pair(kept=(0, 1, 2))
    batches, ridge = cases(), 0.1
    layer = Decoder.of(proxy).blocks[2].mlp.down_proj
    old, inputs, wanted, given = layer.weight.clone(), [], [], []
    handle = layer.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    for batch in batches:
        entered = []
        given.append(observe(proxy, batch, [2])["block_2"])
        inputs.append(entered[0][batch["attention_mask"].bool()])
        wanted.append(observe(target, batch, [5])["block_5"])
    handle.remove()
    z, h, h_star = (torch.cat(parts).detach().double() for parts in (inputs, wanted, given))
    scale = h.square().mean(dim=1, keepdim=True).rsqrt()
    z, missing = z * scale, (h - h_star) * scale
    level = ridge * z.square().sum(dim=0).mean()
    rows = torch.cat([z, level.sqrt() * torch.eye(z.shape[1], dtype=torch.float64)])
    change = torch.linalg.lstsq(rows, torch.cat([missing, torch.zeros(z.shape[1], h.shape[1])])).solution.T
    heal(proxy, target, batches, layer_map=layer_map((0, 1, 2)), ridge=ridge)
    torch.testing.assert_close(layer.weight.double(), old.double() + change, rtol=1e-4, atol=1e-5)


def test_padding_counts_for_nothing():
    once, target = make_pair()
    twice = copy.deepcopy(once)
    batches = cases()
    longer = [
        {name: torch.nn.functional.pad(tensor, (0, 3), value=0) for name, tensor in batch.items()} for batch in batches
    ]
    heal(once, target, batches, layer_map=layer_map(), ridge=0.01)
    heal(twice, target, longer, layer_map=layer_map(), ridge=0.01)
    for name, tensor in once.state_dict().items():
        torch.testing.assert_close(twice.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


def test_half_precision_proxies_are_healed_in_their_precision():
    target = small_model("llama").bfloat16()
    proxy = Decoder.of(target).subset(KEPT)
    found = heal(proxy, target, cases(), layer_map=layer_map(), ridge=0.01)
    assert proxy.dtype == torch.bfloat16
    for gap, behind in zip(found, (2, 5), strict=True):
        assert error_behind(proxy, target, gap.block, behind, cases()) < 0.95 * gap.before


def test_a_proxy_without_gaps_stays_as_it_is():
    proxy, target = make_pair(kept=(2, 3, 4, 5))
    before = copy.deepcopy(proxy.state_dict())
    assert heal(proxy, target, cases(), layer_map=layer_map((2, 3, 4, 5)), ridge=0.01) == ()
    assert all(torch.equal(tensor, before[name]) for name, tensor in proxy.state_dict().items())


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "olmo2"])
def test_norms_behind_the_feed_forward_layer_are_refused(family):
    proxy, target = make_pair(family)
    with pytest.raises(
        ModelError, match=r"healing\.rows: \w+ does not add its feed-forward output .*distillation\.steps"
    ):
        heal(proxy, target, cases(), layer_map=layer_map(), ridge=0.01)


def test_mixtures_of_experts_are_refused():
    proxy, target = make_pair("mixtral")
    with pytest.raises(ModelError, match=r"healing\.rows: .* has no single feed-forward layer to fit"):
        heal(proxy, target, cases(), layer_map=layer_map(), ridge=0.01)


@pytest.mark.parametrize(("kept", "neurons"), [((0, 0, 1), None), ((0, 1, 2), ((0,), (0,), (0,)))])
def test_shared_and_narrowed_blocks_are_refused(kept, neurons):
    with pytest.raises(ConfigError, match=r"healing\.rows needs a compressor that removes whole blocks"):
        gaps(layer_map(kept, neurons), 6)


def test_text_without_tokens_is_refused():
    proxy, target = make_pair()
    empty = {name: torch.zeros(1, 4, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    with pytest.raises(DataError, match=r"healing\.rows: the text holds no token"):
        heal(proxy, target, [empty], layer_map=layer_map(), ridge=0.01)


def test_states_that_are_not_finite_are_refused():
    proxy, target = make_pair()
    Decoder.of(target).blocks[2].mlp.down_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(ModelError, match=r"healing: hidden states are not finite"):
        heal(proxy, target, cases(), layer_map=layer_map(), ridge=0.01)


@pytest.mark.parametrize(
    ("options", "key"), [({"rows": -1}, "rows"), ({"ridge": 0.0}, "ridge"), ({"ridge": -1.0}, "ridge")]
)
def test_options_out_of_range_name_their_key(options, key):
    with pytest.raises(ConfigError, match=rf"healing\.{key} must be"):
        HealingConfig(**options)


def test_a_ridge_without_rows_is_refused():
    with pytest.raises(ConfigError, match=r"healing\.rows must be at least 1 where healing\.ridge is set"):
        HealingConfig(ridge=0.1)
