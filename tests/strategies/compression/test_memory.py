"""Making a proxy takes the proxy's own memory above the target's, as `recipes plan` says, and no more."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.compression import peak_above
from fedproxy.models import Decoder
from fedproxy.models.decoder import parameter_count
from fedproxy.strategies.compression import Compressor


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["random", "ffn_width"])
def test_resident_memory_rises_by_the_proxy_alone(name, tied):
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=12,
        num_attention_heads=4,
        tie_word_embeddings=tied,
    )
    target = LlamaForCausalLM(config).eval().requires_grad_(False)  # 110 MiB, 79 where tied
    rule = Compressor.by_name(name)(ratio=0.5)
    scores = rule.score(Decoder.of(target), [])
    rule.build(target, scores)  # what a first time loads and compiles does not count
    built = []
    peak = peak_above(lambda: built.append(rule.build(target, scores)))
    if peak is None:
        pytest.skip("reads the peak of resident memory from Linux's /proc")
    proxy, _ = built[0]
    # a copy of the whole target first, or of the tied embedding twice, is 1.2 to 1.8 times the proxy here; the check of
    # its logits, float32 (8 tokens, 32000) of both models, takes 4 MiB
    logits = 4 * 8 * 32_000 * 4
    assert 4 * parameter_count(proxy) * 0.9 < peak < 4 * parameter_count(proxy) * 1.05 + logits
    assert (proxy.lm_head.weight is proxy.model.embed_tokens.weight) == tied
    assert torch.equal(proxy.lm_head.weight, target.lm_head.weight)
