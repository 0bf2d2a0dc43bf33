"""Making a proxy takes the proxy's own memory above the target's, as `recipes plan` says, and no more."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.compression import peak_above
from fedproxy.models import Decoder
from fedproxy.models.decoder import parameter_count
from fedproxy.strategies.compression import Compressor, base, ffn_width


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["random", "ffn_width"])
def test_resident_memory_rises_by_the_proxy_alone(name, tied, monkeypatch):
    # the checks of a proxy run a few tokens through it, whose logits would be as large as what is measured here
    for module in (base, ffn_width):
        monkeypatch.setattr(module, "check_decoder", lambda *args, **options: None)
    monkeypatch.setattr(base, "check_subset", lambda *args: None)
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
    # a copy of the whole target first, or of the tied embedding twice, is 1.2 to 1.8 times the proxy here
    assert 4 * parameter_count(proxy) * 0.9 < peak < 4 * parameter_count(proxy) * 1.1
    assert (proxy.lm_head.weight is proxy.model.embed_tokens.weight) == tied
    assert torch.equal(proxy.lm_head.weight, target.lm_head.weight)
