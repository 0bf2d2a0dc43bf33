"""Twelve decoder families as small random models: 6 blocks, 128 positions, hidden 32, vocabulary 61."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

FAMILIES = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 5},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "gemma2": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "final_logit_softcapping": 2.0,
        "attn_logit_softcapping": 5.0,
        "sliding_window": 4,
    },
    "gemma3_text": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    },
    "phi3": {"num_key_value_heads": 2},
    "olmo2": {"num_key_value_heads": 2},
    "gpt2": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "gpt_neox": {},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
}
"""Model type to what it needs beyond the common sizes; sliding windows are shorter than the tests' texts."""


def small_model(family: str, seed: int = 0, layers: int = 6) -> torch.nn.Module:
    """Return a random model with weights large enough that every block matters."""
    common = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = AutoConfig.for_model(family, **{**common, **FAMILIES[family]})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.2).add_(1.0 if parameter.ndim == 1 else 0.0)
    return model.eval()


def texts(rows: int = 5, longest: int = 12, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return a padded batch of random texts of different lengths, the first the longest."""
    lengths = [max(2, longest - 2 * row) for row in range(rows)]
    ids = torch.randint(3, 61, (rows, longest), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}
