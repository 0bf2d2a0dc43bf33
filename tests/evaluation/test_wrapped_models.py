"""A wrapper of three models is scored with shared prefixes, like any model and like stock lm-eval."""

import pytest
import torch

from fedproxy.models import Decoder
from fedproxy.models.logit_offset import LogitOffsetModel

from .test_prefix_sharing import FAMILIES, REQUESTS, assert_equal, both, build


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_logit_offset_answers_equal_stock_hflm_and_the_sum_of_logits(family, tokenizer):
    target = build(family, FAMILIES[family], tokenizer)
    untuned, tuned = Decoder.of(target).subset((0,)), Decoder.of(target).subset((0,))
    with torch.no_grad():
        for parameter in Decoder.of(tuned).blocks.parameters():
            parameter.mul_(1.2)
    joined = LogitOffsetModel(target, tuned, untuned, alpha=0.7)
    ours, found, expected = both(joined, tokenizer)
    assert ours.sharing, ours.obstacle
    assert_equal(found, expected)
    context, answer = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in REQUESTS[0])
    ids = torch.tensor([context + answer])
    with torch.no_grad():
        t, s, u = (model(ids).logits[0].double() for model in (target, tuned, untuned))
    logprobs = (t + 0.7 * (s - u)).log_softmax(-1)
    wanted = sum(float(logprobs[len(context) - 1 + i, token]) for i, token in enumerate(answer))
    assert found[0][0] == pytest.approx(wanted, abs=1e-3)
