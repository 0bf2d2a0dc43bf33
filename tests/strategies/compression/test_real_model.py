"""Block Influence and a narrowed proxy on SmolLM2 and real text."""

import pytest
import torch

from fedproxy.data.assets import resolve
from fedproxy.data.sources import read_texts
from fedproxy.models import Decoder, load_model, load_tokenizer, state_sha256
from fedproxy.models.decoder import parameter_count
from fedproxy.modules.fidelity import compare
from fedproxy.pipeline.data import text_batches
from fedproxy.strategies.compression import Compressor
from fedproxy.strategies.compression.block_influence import block_influence
from fedproxy.strategies.compression.healing import heal
from fedproxy.strategies.fusion import Fusion
from tests.strategies.compression.reference import influence

pytestmark = pytest.mark.real_model


@pytest.fixture(scope="module")
def setting():
    path = resolve("asset:smollm2-135m")
    texts = read_texts("asset:calibration", 8, 0)
    return load_model(path), text_batches(texts, load_tokenizer(path), max_tokens=128)


def test_influence_equals_the_plain_reference(setting):
    model, batches = setting
    (batch,) = batches
    scores = block_influence(Decoder.of(model), batches)
    assert torch.allclose(scores, influence(model, batch), atol=1e-5)
    assert {0, 1} <= set(scores.topk(8).indices.tolist())


def test_narrowed_proxy_has_equal_parameters_and_fuses_back(setting):
    model, batches = setting
    share = 8 * 3_540_096 / parameter_count(model)  # eight blocks' worth
    rule = Compressor.by_name("ffn_width")(ratio=share, ratio_of="parameters", saliency="activations")
    proxy, layer_map = rule.compress(model, batches)
    assert 0 <= parameter_count(proxy) - 106_194_240 < 30 * 3 * 576
    near = compare(model, proxy, [{name: tensor[:2] for name, tensor in batches[0].items()}])
    assert 0 < near.kl < 20
    assert state_sha256(Fusion.by_name("plug_in")().fuse(model, proxy, proxy, layer_map)) == state_sha256(model)


@pytest.mark.slow
def test_healing_nearly_halves_the_divergence_of_half_of_the_blocks():
    path = resolve("asset:smollm2-135m")
    model, tokenizer, texts = load_model(path), load_tokenizer(path), read_texts("asset:calibration", 136, 0)
    fitted, held_out = (text_batches(part, tokenizer, max_tokens=64) for part in (texts[8:], texts[:8]))
    kept = (0, 1, 2, 8, 10, 11, 19, 20, 21, 22, 23, 24, 27, 28, 29)  # Block Influence's
    proxy, layer_map = Compressor.by_name("block_influence")(keep=kept).compress(model)
    before = compare(model, proxy, held_out).kl
    found = heal(proxy, model, fitted, layer_map=layer_map, ridge=0.01)
    assert [(gap.block, gap.removed) for gap in found] == [(2, 5), (3, 1), (5, 7), (11, 2)]
    assert compare(model, proxy, held_out).kl < 0.6 * before  # 0.53 when measured
