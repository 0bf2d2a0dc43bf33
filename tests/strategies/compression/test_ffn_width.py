"""Narrowed feed-forward layers: which neurons stay, that the proxy is their model, and where fusion puts them."""

import pytest
import torch

from fedproxy.errors import ConfigError, ModelError
from fedproxy.models import Decoder, load_model, state_sha256
from fedproxy.models.decoder import parameter_count
from fedproxy.models.feed_forward import FeedForward
from fedproxy.strategies.compression import Compressor
from fedproxy.strategies.compression.ffn_width import feed_forwards, output_saliency, weight_saliency
from fedproxy.strategies.fusion import Fusion
from fedproxy.strategies.trainable import Trainable
from tests.strategies.compression.architectures import FAMILIES, small_model, texts

DENSE = [family for family in FAMILIES if family != "mixtral"]
OUT = {"gpt2": "mlp.c_proj", "opt": "fc2", "gpt_neox": "mlp.dense_4h_to_h"}


@torch.no_grad()
def silence(model, family, layer_map):
    """Zero what the removed neurons put out: by hand what narrowing does by leaving them away."""
    for index, block in enumerate(Decoder.of(model).blocks):
        out = block.get_submodule(OUT.get(family, "mlp.down_proj"))
        gone = torch.ones(out.weight.shape[0 if family == "gpt2" else 1], dtype=torch.bool)
        gone[list(layer_map.neurons[index])] = False
        if family == "gpt2":
            out.weight[gone] = 0
        else:
            out.weight[:, gone] = 0
    return model


@pytest.mark.parametrize("saliency", ["weights", "activations"])
@pytest.mark.parametrize("family", DENSE)
def test_proxy_equals_the_target_with_silenced_neurons(family, saliency, tmp_path):
    model = small_model(family)
    rule = Compressor.by_name("ffn_width")(ratio=0.25, saliency=saliency)
    width = feed_forwards(Decoder.of(model))[0].width
    proxy, layer_map = rule.compress(model, [texts()])
    assert layer_map.proxy_to_target == tuple(range(6))
    assert all(len(row) == width - width // 4 and list(row) == sorted(set(row)) for row in layer_map.neurons)
    proxy.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert width == (4 * 32 if family == "gpt2" else 48)
    expected = silence(small_model(family), family, layer_map)(**texts()).logits
    assert torch.allclose(loaded(**texts()).logits, expected, atol=1e-4)
    assert parameter_count(loaded) < parameter_count(model)


def test_weight_saliency_is_the_norm_of_all_weights_of_a_neuron():
    for family, names in {
        "llama": ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"),
        "phi3": ("mlp.gate_up_proj.weight", "mlp.down_proj.weight"),
        "opt": ("fc1.weight", "fc1.bias", "fc2.weight"),
    }.items():
        decoder = Decoder.of(small_model(family))
        block = decoder.blocks[2]
        first, *middle, last = (block.get_parameter(name).double() for name in names)
        neuron = 7
        parts = [
            first[neuron],
            last[:, neuron],
            *(part[neuron, None] if part.ndim == 1 else part[neuron] for part in middle),
        ]
        if family == "phi3":
            parts.append(first[neuron + 48])  # gate and up lie one after the other
        expected = torch.cat(parts).norm()
        found = weight_saliency(decoder, feed_forwards(decoder))
        assert found.shape == (6, 48)
        assert found[2, neuron] == pytest.approx(float(expected.detach()))


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_output_saliency_is_the_size_of_a_neurons_part_in_the_output(family):
    model = small_model(family)
    decoder = Decoder.of(model)
    name = OUT.get(family, "mlp.down_proj")
    out = decoder.blocks[1].get_submodule(name)
    seen = []
    handle = out.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    batch = texts()
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        model(input_ids=ids[mask.bool()][None], use_cache=False)
    handle.remove()
    activations = torch.cat([part.reshape(-1, part.shape[-1]) for part in seen]).double()
    weight = out.weight.double() if family == "gpt2" else out.weight.double().T
    parts = activations[:, 5, None] * weight[5]  # what neuron 5 adds to each token's output
    expected = parts.square().sum(-1).mean().sqrt()
    assert output_saliency(decoder, [batch])[1, 5] == pytest.approx(float(expected.detach()), rel=1e-5)


@pytest.mark.parametrize("mode", ["replace", "delta"])
@pytest.mark.parametrize("family", DENSE)
def test_fusion_puts_neurons_back_where_they_came_from(family, mode):
    target = small_model(family)
    proxy, layer_map = Compressor.by_name("ffn_width")(ratio=0.5).compress(target)
    fuse = Fusion.by_name("plug_in")(mode=mode).fuse
    assert state_sha256(fuse(target, proxy, proxy, layer_map)) == state_sha256(target)
    before = {name: tensor.clone() for name, tensor in proxy.state_dict().items()}
    decoder = Decoder.of(target)
    layer = feed_forwards(decoder)[3]
    after = dict(before)
    for name in layer.axes:
        after[decoder.full_name(3, name)] = before[decoder.full_name(3, name)] + 1
    fused, own = fuse(target, before, after, layer_map).state_dict(), target.state_dict()
    for name, (axis, copies) in layer.axes.items():
        change = fused[decoder.full_name(3, name)] - own[decoder.full_name(3, name)]
        rows = change.movedim(axis, 0).reshape(copies, layer.width, -1)
        kept = torch.zeros(layer.width, dtype=torch.bool)
        kept[list(layer_map.neurons[3])] = True
        assert torch.allclose(rows[:, kept], torch.ones(()), atol=1e-5), name
        assert not rows[:, ~kept].any(), name
    moved = {name for name in own if not torch.equal(own[name], fused[name])}
    assert moved == {decoder.full_name(3, name) for name in layer.axes}


def test_a_tuned_adapter_reaches_the_target():
    target = small_model("llama")
    proxy, layer_map = Compressor.by_name("ffn_width")(ratio=0.5).compress(target)
    before = {name: tensor.clone() for name, tensor in proxy.state_dict().items()}
    model = Trainable.by_name("lora")(r=2, alpha=2, modules=["down_proj"]).attach(proxy)
    state = {name: torch.randn(tensor.shape) for name, tensor in model.state().items()}
    model.load_state(state)
    fused = Fusion.by_name("plug_in")().fuse(target, before, {**before, **model.merged_weights()}, layer_map)
    a, b = (state[f"base_model.model.model.layers.4.mlp.down_proj.lora_{part}.weight"] for part in "AB")
    change = torch.zeros(32, 48)
    change[:, list(layer_map.neurons[4])] = b @ a
    name = "model.layers.4.mlp.down_proj.weight"
    assert torch.allclose(fused.state_dict()[name], target.state_dict()[name] + change, atol=1e-5)


def test_equal_parameters_with_whole_blocks():
    model = small_model("llama")
    share = 2 * parameter_count(model.model.layers[0]) / parameter_count(model)
    narrow, _ = Compressor.by_name("ffn_width")(ratio=share, ratio_of="parameters").compress(model)
    blocks, _ = Compressor.by_name("random")(ratio=share, ratio_of="parameters").compress(model)
    one_neuron_each = 6 * 3 * 32
    assert 0 <= parameter_count(narrow) - parameter_count(blocks) < one_neuron_each
    outline = Compressor.by_name("ffn_width")(ratio=share, ratio_of="parameters").outline(Decoder.of(model))
    assert outline.intermediate_size == narrow.config.intermediate_size


def test_ratio_nought_is_the_target_and_one_neuron_stays():
    model = small_model("llama")
    proxy, layer_map = Compressor.by_name("ffn_width")(ratio=0.0).compress(model)
    assert layer_map.neurons is None
    assert torch.equal(proxy(**texts()).logits, model(**texts()).logits)
    proxy, layer_map = Compressor.by_name("ffn_width")(ratio=0.99).compress(model)
    assert [len(row) for row in layer_map.neurons] == [1] * 6


def test_a_ratio_that_removes_no_neuron_is_refused():
    rule, decoder = Compressor.by_name("ffn_width"), Decoder.of(small_model("llama"))  # 48 neurons in a block
    with pytest.raises(ConfigError) as caught:
        rule(ratio=0.02).outline(decoder)
    line = "compression.ratio=0.02 removes no neuron; give at least 0.0209, or choose compression.name=none to keep all"
    assert str(caught.value) == line
    assert rule(ratio=0.0209).outline(decoder).intermediate_size == 47
    with pytest.raises(ConfigError, match=r"^compression.ratio=0.001 removes no neuron; give at least 0.01") as caught:
        rule(ratio=0.001, ratio_of="parameters").outline(decoder)
    least = float(str(caught.value).split("at least ")[1].split(",")[0])
    assert rule(ratio=least, ratio_of="parameters").outline(decoder).intermediate_size == 47


def test_lowest_saliency_goes_and_of_equals_the_lower_index():
    model = small_model("llama")
    scores = torch.ones(6, 48)
    scores[:, 40] = 0.5
    _, layer_map = Compressor.by_name("ffn_width")(ratio=3 / 48).build(model, scores)
    assert layer_map.neurons[0] == tuple(i for i in range(48) if i not in (0, 1, 40))


def test_models_without_one_feed_forward_layer_are_refused():
    with pytest.raises(ModelError, match=r"ffn_width: MixtralDecoderLayer has no single feed-forward layer to narrow"):
        Compressor.by_name("ffn_width")().compress(small_model("mixtral"), [texts()])
    block = small_model("llama").model.layers[0]
    block.mlp.register_parameter("scale", torch.nn.Parameter(torch.ones(48)))  # one more thing per neuron
    with pytest.raises(ModelError, match=r"has no single feed-forward layer"):
        FeedForward.of(block, 32)


def test_what_cannot_be_is_one_line():
    rule = Compressor.by_name("ffn_width")
    with pytest.raises(ConfigError, match=r"^compression.ratio_of must be neurons or parameters, got 'blocks'$"):
        rule(ratio_of="blocks")
    with pytest.raises(ConfigError, match=r"^compression.saliency must be weights or activations, got 'luck'$"):
        rule(saliency="luck")
    with pytest.raises(ConfigError, match=r"^compression.ratio=0.9 of the parameters would remove all 48 neurons"):
        rule(ratio=0.9, ratio_of="parameters").outline(Decoder.of(small_model("llama")))
