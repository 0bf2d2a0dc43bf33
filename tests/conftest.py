"""Small random models of several families."""

import os
import signal

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fedproxy.registry import Component

# Tiny matrices gain nothing from a second thread, and lose much where other processes want the core.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the commands that tests start
os.environ["FEDPROXY_SCORES_MIB"] = "0"  # tests score what they ask for, whatever was scored before
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it, and so would everything that tests start

SIZES = {
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2},
    "gemma2": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "final_logit_softcapping": 2.0,
        "attn_logit_softcapping": 5.0,
        "sliding_window": 4,
    },
    "granite": {"num_key_value_heads": 2, "logits_scaling": 4.0, "embedding_multiplier": 3.0},
    "cohere": {"num_key_value_heads": 2, "logit_scale": 0.25},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "gpt2": {},
}


def tiny_model(family: str, layers: int = 3, seed: int = 0) -> torch.nn.Module:
    """Return a random model of a family: 4 heads, hidden 32, vocabulary 61, weights large enough to matter."""
    common = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = AutoConfig.for_model(family, **{**common, **SIZES[family]})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.2).add_(1.0 if parameter.ndim == 1 else 0.0)
    return model.eval()


LONG = tuple(
    f"tests/{place}"
    for place in ("pipeline", "comparison", "federation", "evaluation/test_real", "strategies/compression/test_real")
)
"""Whole runs and real models: they come first, so that what is left at the end is short and no process waits."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not item.nodeid.startswith(LONG))


@pytest.fixture
def make_model():
    return tiny_model


@pytest.fixture
def make_batch():
    """Right-padded batches: rows of length 9, 6, 4 with 3, 1, 2 answer tokens."""

    def make(seed: int = 0) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        lengths, answers = (9, 6, 4), (3, 1, 2)
        ids = torch.randint(3, 61, (3, 9), generator=generator)
        mask = torch.zeros(3, 9, dtype=torch.long)
        labels = torch.full((3, 9), -100)
        for row, (length, answer) in enumerate(zip(lengths, answers, strict=True)):
            ids[row, length:] = 0
            mask[row, :length] = 1
            labels[row, length - answer : length] = ids[row, length - answer : length]
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    return make


def _families(cls=Component):
    for child in cls.__subclasses__():
        if "_members" in child.__dict__:
            yield child
        yield from _families(child)


@pytest.fixture(autouse=True)
def _registry_as_it_was():
    """Forget components that a test registered."""
    before = {family: dict(family._members) for family in _families()}
    yield
    for family, members in before.items():
        family._members.clear()
        family._members.update(members)
