"""KL and perplexity against a plain float64 loop over single texts."""

import math

import pytest
import torch

from fedproxy.errors import DataError
from fedproxy.models import Decoder
from fedproxy.modules.fidelity import compare


def plain(target, proxy, batch):
    kl, nll, count = 0.0, [0.0, 0.0], 0
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        text = ids[mask.bool()][None]
        with torch.no_grad():
            logs = [model(text, use_cache=False).logits[0].double().log_softmax(-1) for model in (target, proxy)]
        for place in range(text.shape[1] - 1):
            p, q = logs[0][place], logs[1][place]
            kl += float((p.exp() * (p - q)).sum())
            for which, log in enumerate((p, q)):
                nll[which] -= float(log[text[0, place + 1]])
            count += 1
    return count, kl / count, *(math.exp(value / count) for value in nll)


def test_equals_a_plain_loop_and_ignores_padding(make_model, make_batch):
    target = make_model("llama", layers=4)
    proxy = Decoder.of(target).subset([0, 3])
    batch = make_batch()
    found = compare(target, proxy, [batch])
    tokens, kl, target_ppl, proxy_ppl = plain(target, proxy, batch)
    assert (found.tokens, tokens) == (8 + 5 + 3, 16)  # texts of 9, 6 and 4 tokens predict one fewer each
    assert found.kl == pytest.approx(kl, rel=1e-4)
    assert found.target_perplexity == pytest.approx(target_ppl, rel=1e-4)
    assert found.proxy_perplexity == pytest.approx(proxy_ppl, rel=1e-4)
    assert found.kl > 0.1
    assert min(found.target_tokens_per_second, found.proxy_tokens_per_second) > 0


def test_a_model_is_at_no_distance_from_itself(make_model, make_batch):
    target = make_model("llama")
    found = compare(target, target, [make_batch()])
    assert found.kl == pytest.approx(0, abs=1e-6)
    assert found.target_perplexity == found.proxy_perplexity


def test_texts_of_one_token_predict_nothing(make_model):
    batch = {"input_ids": torch.tensor([[5]]), "attention_mask": torch.tensor([[1]])}
    with pytest.raises(DataError, match="no held-out text has two tokens; give rows with text"):
        compare(make_model("llama"), make_model("llama"), [batch])
