"""Families that say per block what a block is, as small random models: 6 or 8 blocks, windows of 5, hidden 32.

Every one has as many end tokens as blocks: what is as long as the model is deep is not for that reason per block.
"""

import copy
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

S, F, L = "sliding_attention", "full_attention", "linear_attention"
END = [2, 5, 6, 7, 8, 9]
BASE = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4}
BASE |= {"max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": END, "pad_token_id": 0}
BASE |= {"num_key_value_heads": 2}
WINDOW, HEAD = {"sliding_window": 5}, {"head_dim": 8}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 16}
ROUTED |= {"n_group": 1, "topk_group": 1}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
LATENT |= {"num_key_value_heads": 4}
INDEX = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 64}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_expand": 2}
MAMBA |= {"mamba_chunk_size": 16}
CHUNKS = {"intermediate_size_mlp": 48, "num_local_experts": 4, "num_experts_per_tok": 1, "attention_chunk_size": 5}
ZAMBA = {"num_key_value_heads": 4, "mamba_d_state": 8, "use_mamba_kernels": False}
ERNIE = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_num_shared_experts": 1}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 16, "patch_size": 8}
GEMMA4 = {**HEAD, **WINDOW, "global_head_dim": 16, "hidden_size_per_layer_input": 0, "layer_types": [S, S, F] * 2}
SLICED = {**HEAD, **WINDOW, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 61}
GEMMA3N = {**SLICED, "num_kv_shared_layers": 2, "laurel_rank": 8, "altup_num_inputs": 2}
GEMMA3N |= {"num_hidden_layers": 8, "layer_types": [S, F] * 4, "intermediate_size": [48] * 8}

CUTS: dict[str, tuple[str, dict[str, Any], list[list[int]]]] = {
    "llama": ("llama", {}, [[4, 5]]),
    "llama4, all sparse": ("llama4_text", HEAD | CHUNKS | {"moe_layers": [0, 1, 2, 3, 4, 5]}, [[2, 4, 5]]),
    "llama4, every second": ("llama4_text", HEAD | CHUNKS | {"interleave_moe_layer_step": 2}, [[1, 2, 3], [0, 2]]),
    "gemma4": ("gemma4_text", GEMMA4, [[2, 5], [0, 1, 5]]),
    "gemma4, equal heads": ("gemma4_text", GEMMA4 | {"global_head_dim": 8}, [[1, 2]]),
    "gemma4, shared keys": (
        "gemma4_text",
        GEMMA4 | SLICED | {"num_kv_shared_layers": 2, "layer_types": [S, F] * 3},
        [[2, 3, 4, 5], [0, 1]],
    ),
    "gemma3n": ("gemma3n_text", GEMMA3N, [[0, 4, 5, 7], [1, 3]]),
    "gemma3 with a tower": (
        "gemma3",
        {"text_config": BASE | HEAD | WINDOW, "vision_config": VISION, "mm_tokens_per_image": 1},
        [[1, 4]],
    ),
    "bamba": ("bamba", MAMBA | {"attn_layer_indices": [2, 5]}, [[2, 5], [0, 1, 5]]),
    "gpt_neo": (
        "gpt_neo",
        {"num_layers": 6, "num_heads": 4, "window_size": 5, "attention_types": [[["global", "local"], 3]]},
        [[1, 3], [0, 1, 4]],
    ),
    "zamba2": (
        "zamba2",
        ZAMBA | {"n_mamba_heads": 4, "chunk_size": 16, "layers_block_type": ["mamba", "mamba", "hybrid"] * 2},
        [[1, 2, 5]],
    ),
    "zamba": ("zamba", ZAMBA | {"n_mamba_heads": 2, "attn_layer_period": 3, "attn_layer_offset": 2}, [[1, 2, 5]]),
    "jamba": (
        "jamba",
        MOE
        | {"mamba_d_state": 8, "use_mamba_kernels": False, "num_hidden_layers": 8}
        | {"attn_layer_period": 4, "attn_layer_offset": 2, "expert_layer_period": 2, "expert_layer_offset": 1},
        [[2, 6], [0, 1, 2, 5]],
    ),
    "qwen2_moe": ("qwen2_moe", MOE | {"shared_expert_intermediate_size": 16, "decoder_sparse_step": 2}, [[1, 4, 5]]),
    "qwen3_moe": ("qwen3_moe", MOE | HEAD | {"mlp_only_layers": [0, 3]}, [[1, 3, 4]]),
    "qwen3_next": (
        "qwen3_next",
        MOE
        | DELTA
        | HEAD
        | {"shared_expert_intermediate_size": 16, "mlp_only_layers": [1, 3], "layer_types": [L, L, F] * 2},
        [[1, 2, 3]],
    ),
    "deepseek_v3": ("deepseek_v3", LATENT | ROUTED | {"first_k_dense_replace": 2}, [[2, 3], [1, 4]]),
    "glm4_moe": ("glm4_moe", HEAD | ROUTED | {"first_k_dense_replace": 1}, [[2, 3]]),
    "glm_moe_dsa": (
        "glm_moe_dsa",
        LATENT | ROUTED | INDEX | {"first_k_dense_replace": 1, "indexer_types": ["full", "shared"] * 2 + ["full"] * 2},
        [[0, 2, 5], [2, 3]],
    ),
    "lfm2_moe": ("lfm2_moe", MOE | {"num_dense_layers": 2, "layer_types": ["conv", "conv", F] * 2}, [[2, 5], [1, 5]]),
    "ernie4_5_moe": ("ernie4_5_moe", ERNIE | {"moe_layer_start_index": 1, "moe_layer_end_index": 4}, [[2, 5], [0, 3]]),
    "granite_swa": ("granite_swa", WINDOW | {"layer_rope_theta": [1e4, 1e5] * 3}, [[1, 2], [0, 3, 5]]),
    "laguna": (
        "laguna",
        MOE
        | HEAD
        | WINDOW
        | {"shared_expert_intermediate_size": 16, "num_attention_heads_per_layer": [4, 8, 8] * 2}
        | {"layer_types": [F, S, S] * 2},
        [[0, 1], [2, 3, 5]],
    ),
    "nemotron_h": (
        "nemotron_h",
        HEAD
        | ROUTED
        | {"moe_shared_expert_intermediate_size": 16, "mamba_num_heads": 4, "mamba_head_dim": 16}
        | {"ssm_state_size": 8, "n_groups": 1, "chunk_size": 16, "use_mamba_kernels": False}
        | {"layers_block_type": [L, "moe", F, "mlp", L, F]},
        [[1, 2, 3], [2, 5]],
    ),
    "recurrent_gemma": ("recurrent_gemma", {"lru_width": 32, "attention_window_size": 5}, [[0, 2], [1, 2, 3, 5]]),
    "smollm3": ("smollm3", WINDOW | {"use_sliding_window": True, "no_rope_layers": [1, 1, 0, 1, 1, 0]}, [[2, 3]]),
    "minicpm3": ("minicpm3", LATENT, [[1, 4]]),
    "longcat_flash": (
        "longcat_flash",
        LATENT
        | HEAD
        | {"num_layers": 6, "ffn_hidden_size": 48, "expert_ffn_hidden_size": 16, "moe_topk": 2}
        | {"n_routed_experts": 4, "zero_expert_num": 1},
        [[1, 4]],
    ),
    "modernbert-decoder": ("modernbert-decoder", {"local_attention": 10, "global_attn_every_n_layers": 3}, [[0, 4]]),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", HEAD | {"num_experts": 4, "moe_topk": [2] * 6}, [[1, 4]]),
}
"""Name -> model type, options beyond the common ones, and blocks to keep."""


def family_model(model_type: str, **options: Any) -> torch.nn.Module:
    """Return a small random model whose weights are large enough that every block matters."""
    renamed = {"gpt_neo": {"intermediate_size": 48}, "longcat_flash": {}}.get(model_type, {})
    config = AutoConfig.for_model(model_type, **copy.deepcopy(_common(model_type) | renamed | options))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config).float().eval()
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim > 1:
                    weight.mul_(3.0)
    return model


def _common(model_type: str) -> dict[str, Any]:
    """Return the common sizes, those left out that a family has under another name."""
    other = {
        "gpt_neo": {"num_hidden_layers", "num_attention_heads", "num_key_value_heads"},
        "longcat_flash": {"num_hidden_layers", "intermediate_size"},
        "nemotron_h": {"num_hidden_layers"},
        "gemma3": set(BASE),
    }
    return {key: value for key, value in BASE.items() if key not in other.get(model_type, ())}
