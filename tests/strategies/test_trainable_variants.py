"""rsLoRA and DoRA against PEFT's own: forward, merge, files, scale."""

import math

import pytest
import torch
from fedproxy.pipeline.components import check_components
from peft import PeftModel

from fedproxy.config import load_config
from fedproxy.errors import ConfigError
from fedproxy.strategies.trainable.fused_lora import FusedLoraLinear

from .test_trainable import IDS, attach, lora, make_gpt2, make_llama

MAKERS = {"llama": make_llama, "gpt2": make_gpt2}
PLACES = {"llama": ("q_proj", "down_proj", "up_proj"), "gpt2": ("c_attn", "c_proj")}


def nudge(trainable, seed=1):
    """Move every trainable tensor by a little, so that lengths stay near those of the weights."""
    generator = torch.Generator().manual_seed(seed)
    state = trainable.state()
    trainable.load_state({n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in state.items()})


def merged_by_peft(make, folder):
    return PeftModel.from_pretrained(make(), folder).merge_and_unload().state_dict()


@pytest.mark.parametrize("options", [{"rslora": True}, {"dora": True}, {"rslora": True, "dora": True}])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_forward_files_and_merge_are_those_of_peft(tmp_path, family, options):
    make = MAKERS[family]
    model = make()
    plain = model(IDS).logits
    trainable = attach(model, modules=PLACES[family], r=3, **options)
    torch.testing.assert_close(model(IDS).logits, plain)
    untrained = trainable.merged_weights()
    for name, weight in make().state_dict().items():
        assert name not in untrained or torch.equal(untrained[name], weight), name
    nudge(trainable)
    trainable.save_adapter(tmp_path)
    loaded = PeftModel.from_pretrained(make(), tmp_path)
    tuned = model(IDS).logits
    assert not torch.allclose(tuned, plain, atol=1e-3)
    torch.testing.assert_close(loaded(IDS).logits, tuned, rtol=1e-4, atol=1e-5)
    ours, theirs = trainable.merged_weights(), merged_by_peft(make, tmp_path)
    assert len(ours) == len(PLACES[family]) * 4 if family == "llama" else ours
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)
    whole = make()
    whole.load_state_dict({**whole.state_dict(), **dict(ours)})
    torch.testing.assert_close(whole(IDS).logits, tuned, rtol=1e-4, atol=1e-5)


def test_the_scale_of_rslora_is_alpha_over_the_root_of_r():
    options = lora(r=9, alpha=6, rslora=True)
    assert options.lora_scaling == pytest.approx(2.0)  # 6 / 3
    assert lora(r=9, alpha=6).lora_scaling == pytest.approx(6 / 9)
    assert lora(dora=True).lora_scaling is None
    trainable = options.attach(make_llama())
    assert {layer.scaling["default"] for layer in trainable.layers().values()} == {options.lora_scaling}


def test_what_is_moved_into_frozen_weights_keeps_its_scale_under_rslora(tmp_path):
    model = make_llama()
    trainable = attach(model, modules=("q_proj",), rslora=True)
    nudge(trainable)
    moved = {
        name: 0.1 * torch.randn(t.shape, generator=torch.Generator().manual_seed(5))
        for name, t in trainable.state().items()
    }
    trainable.add_to_frozen(moved)
    trainable.save_adapter(tmp_path)  # rank 4 now, of alpha / sqrt(2) = alpha' / sqrt(4)
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path)
    assert loaded.peft_config["default"].lora_alpha == pytest.approx(6 * math.sqrt(2))
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)


def test_dora_runs_as_peft_does_and_trains_its_lengths():
    model = make_llama()
    trainable = attach(model, modules=("q_proj", "v_proj"), dora=True)
    assert not any(isinstance(layer, FusedLoraLinear) for layer in trainable.layers().values())
    assert sum(name.endswith("lora_magnitude_vector.weight") for name in trainable.parameters()) == 8
    model(IDS, labels=IDS).loss.backward()
    lengths = [p.grad for name, p in trainable.parameters().items() if "magnitude" in name]
    assert all(gradient is not None and gradient.any() for gradient in lengths)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["federation.space=product"],
            r"federation\.space=product needs one pair .*trainable\.dora=true has none",
        ),
        (
            ["aggregator.name=fedsa_lora"],
            r"aggregator\.name=fedsa_lora needs one pair .*trainable\.dora=true has none",
        ),
        (["client.quantization=8bit"], r"trainable\.dora=true needs the proxy's own weights, which client\.quantizati"),
        (["trainable.parameters=[w]"], r"trainable\.dora must be false where trainable\.parameters is set, got True"),
    ],
)
def test_what_does_not_go_with_dora_is_one_line(words, message):
    with pytest.raises(ConfigError, match=message):
        check_components(load_config(["recipe=fedproxy_tiny", "trainable.dora=true", "regularizer.name=none", *words]))


def test_a_row_of_zeros_has_no_length_to_train():
    model = make_llama()
    model.model.layers[1].self_attn.q_proj.weight.data[3] = 0
    with pytest.raises(ConfigError, match=r"trainable\.dora: model\.layers\.1\.self_attn\.q_proj has a row of zeros"):
        attach(model, modules=("q_proj",), dora=True)
