"""Packed rows give the loss and the gradients of rows apart, and a model that would mix them is refused."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fedproxy.data.batching import collate
from fedproxy.data.packing import pack
from fedproxy.data.tokenisation import Example
from fedproxy.errors import ConfigError
from fedproxy.models.probing import check_packing
from fedproxy.modules.answer_logits import answer_logits
from fedproxy.modules.losses import answer_nll

FURTHER = {
    "mistral": {"num_key_value_heads": 2, "sliding_window": 4},
    "gemma3_text": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "mamba": {"state_size": 4},
    "bloom": {},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 3},
    "lfm2": {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention", "conv"]},
}


def build(family):
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 2}
    config = AutoConfig.for_model(family, **{**sizes, "bos_token_id": 1, **FURTHER[family]})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.2).add_(1.0 if parameter.ndim == 1 else 0.0)
    return model.eval()


def examples():
    generator = torch.Generator().manual_seed(4)
    for row, size in enumerate((17, 3, 9, 5, 12, 2, 7, 16)):
        ids = torch.randint(3, 61, (size,), generator=generator).tolist()
        yield Example(tuple(ids), ((1 + row % 2, size),), str(row))


def loss_and_gradients(model, batch):
    model.zero_grad()
    logits, targets = answer_logits(model, batch)
    loss = answer_nll(logits, targets).mean()
    loss.backward()
    return loss, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, len(targets)


FAMILIES = ("llama", "qwen2", "gemma2", "gpt2", "mistral", "gemma3_text")
PAIRS = [(f, kind) for f in FAMILIES for kind in ("sdpa", "eager") if (f, kind) != ("gemma2", "sdpa")]  # it has none


@pytest.mark.parametrize(("family", "implementation"), PAIRS)
def test_loss_and_gradients_are_those_of_rows_apart(make_model, family, implementation):
    model = build(family) if family in FURTHER else make_model(family)
    model.set_attn_implementation(implementation)
    check_packing(model)
    rows = list(examples())
    packed = pack(rows, pad_id=0)
    assert len(packed["input_ids"]) < len(rows) / 1.5
    apart, wanted, count = loss_and_gradients(model, collate(rows, pad_id=0))
    together, found, packed_count = loss_and_gradients(model, packed)
    assert packed_count == count
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=0)
    assert found.keys() == wanted.keys()
    whole = torch.cat([gradient.flatten() for gradient in wanted.values()]).norm()
    for name in wanted:
        assert (found[name] - wanted[name]).norm() <= 1e-5 * whole, name


@pytest.mark.parametrize("family", ["mamba", "bloom", "mpt", "lfm2", "opt"])
def test_families_that_would_mix_rows_are_refused(make_model, family):
    model = build(family) if family in FURTHER else make_model(family)
    with pytest.raises(ConfigError, match=r"^client\.packing: \w+ does not keep rows apart .*; set client"):
        check_packing(model)


def test_a_model_without_positions_is_refused(make_model):
    model = make_model("llama")
    forward = type(model).forward

    class Without(type(model)):
        def forward(self, input_ids, attention_mask=None, use_cache=None):
            return forward(self, input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    model.__class__ = Without
    with pytest.raises(ConfigError, match=r"^client\.packing: Without fails on a few tokens: .*; set client"):
        check_packing(model)
