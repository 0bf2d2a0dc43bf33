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
