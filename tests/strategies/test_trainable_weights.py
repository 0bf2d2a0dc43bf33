"""Whole blocks and biases as what clients train: the same interface as LoRA's, nothing else moves."""

import pytest
import torch
from safetensors.torch import load_file

from fedproxy.errors import ConfigError
from fedproxy.models import LayerMap
from fedproxy.strategies.trainable import Trainable

IDS = torch.tensor([[3, 4, 5, 6, 7]])


def raised(trainable, by=0.1):
    """Raise every trained value and return the state."""
    state = {name: tensor + by for name, tensor in trainable.state().items()}
    trainable.load_state(state)
    return state


@pytest.mark.parametrize(
    ("options", "blocks"),
    [({}, {0, 1, 2, 3}), ({"blocks": "ends", "first": 1, "last": 1}, {0, 3}), ({"blocks": "last"}, {2, 3}),
     ({"blocks": [1]}, {1})],
)  # fmt: skip
def test_full_trains_all_weights_of_the_chosen_blocks(make_model, options, blocks):
    model = make_model("llama", layers=4)
    trainable = Trainable.by_name("full")(**options).attach(model)
    named = dict(model.named_parameters())
    assert set(trainable.state()) == {n for n in named if any(f"layers.{block}." in n for block in blocks)}
    assert {n for n, p in named.items() if p.requires_grad} == set(trainable.state())
    # per block of the small Llama: q, o 32x32; k, v 16x32; gate, up, down 48x32; two norms of 32
    assert trainable.num_parameters == len(blocks) * (2 * 1024 + 2 * 512 + 3 * 1536 + 64)
    assert trainable.parameters().keys() == trainable.state().keys()
    assert Trainable.by_name("full")().lora_scaling is None


def test_bias_trains_biases_of_blocks_alone(make_model):
    model = make_model("gpt2", layers=2)
    trainable = Trainable.by_name("bias")(blocks=[1]).attach(model)
    assert set(trainable.state()) == {
        f"transformer.h.1.{part}.bias"
        for part in ("ln_1", "ln_2", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }


@pytest.mark.parametrize(("name", "family"), [("full", "llama"), ("bias", "opt")])
def test_merged_weights_disabled_and_detached(make_model, name, family):
    model = make_model(family)
    before = model(IDS).logits
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    trainable = Trainable.by_name(name)().attach(model)
    state = raised(trainable)
    after = model(IDS).logits
    assert not torch.allclose(after, before)
    merged = dict(trainable.merged_weights())
    assert all(torch.equal(merged[key], state[key]) for key in state)
    with trainable.disabled():
        assert torch.equal(model(IDS).logits, before)
    assert torch.equal(model(IDS).logits, after)
    plain = trainable.detach()
    assert all(torch.equal(tensor, weights[key]) for key, tensor in plain.state_dict().items())
    assert not any(parameter.requires_grad for parameter in plain.parameters())
    assert all(torch.equal(merged[key], state[key]) for key in state)  # what was read is a copy
    plain.load_state_dict(merged, strict=False)
    assert torch.equal(plain(IDS).logits, after)


def test_saved_weights_load_into_the_proxy(make_model, tmp_path):
    model = make_model("llama")
    trainable = Trainable.by_name("full")(blocks=[0]).attach(model)
    state = raised(trainable)
    trainable.save_adapter(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "trained_weights.safetensors")
    assert all(torch.equal(saved[key], state[key]) for key in state)
    assert not make_model("llama").load_state_dict(saved, strict=False).unexpected_keys


def test_centres_come_from_the_layer_map(make_model):
    shared = LayerMap((0, 2, 2, 3), "")
    chosen = Trainable.by_name("full")(blocks="centres").placed(shared)
    assert chosen.blocks == (0, 2, 3)
    with pytest.raises(ConfigError, match=r"trainable.blocks=centres needs the server's layer map"):
        Trainable.by_name("full")(blocks="centres").attach(make_model("llama"))


def test_what_cannot_be_trained_so(make_model):
    with pytest.raises(ConfigError, match=r"trainable.name=bias: the proxy's blocks have no bias \(llama\); use lora"):
        Trainable.by_name("bias")().attach(make_model("llama"))
    with pytest.raises(ConfigError, match=r"trainable.name=full trains the proxy's own weights, and in bfloat16 small"):
        Trainable.by_name("full")().attach(make_model("llama").bfloat16())
    with pytest.raises(ConfigError, match=r"trainable.blocks names block 7, but the proxy has blocks 0 to 2"):
        Trainable.by_name("full")(blocks=[7]).attach(make_model("llama"))
    with pytest.raises(ConfigError, match=r"trainable\.last must be >= 1"):
        Trainable.by_name("bias")(last=0)
