"""Fields of configurations that follow a cut, and blocks that need others."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fedproxy.errors import ModelError
from fedproxy.models.block_fields import DEPTHS, INDICES, LISTS, cut_fields, cut_slices, depth_of
from fedproxy.models.needs import Need, complete, in_step


def cut(model_type, kept, **options):
    config = AutoConfig.for_model(model_type, **options)
    cut_fields(config, kept, depth_of(config))
    return config


def test_lists_keep_the_entries_of_kept_blocks():
    config = cut("cohere2", [1, 3, 7], num_hidden_layers=8)
    assert config.layer_types == ["sliding_attention", "full_attention", "full_attention"]  # every fourth is full
    assert config.num_hidden_layers == 3


def test_numbers_of_blocks_are_counted_anew():
    assert cut("bamba", [0, 2, 5], num_hidden_layers=6, attn_layer_indices=[2, 4, 5]).attn_layer_indices == [1, 2]
    assert cut("llama4_text", [1, 3], num_hidden_layers=4, moe_layers=[0, 1, 2, 3]).moe_layers == [0, 1]
    kimi = {"num_hidden_layers": 4, "linear_attn_config": {"full_attn_layers": [4], "kda_layers": [1, 2, 3]}}
    config = cut("kimi_linear", [1, 3], **kimi)  # counted from 1: blocks 2 and 4 become 1 and 2
    assert {key: config.linear_attn_config[key] for key in ("kda_layers", "full_attn_layers")} == {
        "kda_layers": [1],
        "full_attn_layers": [2],
    }


def test_blocks_counted_from_an_end_are_those_of_the_kept():
    assert cut("deepseek_v3", [1, 2, 5], num_hidden_layers=6, first_k_dense_replace=3).first_k_dense_replace == 2
    assert cut("deepseek_v3", [4, 5], num_hidden_layers=6, first_k_dense_replace=3).first_k_dense_replace == 0
    options = {"num_hidden_layers": 6, "num_kv_shared_layers": 3, "layer_types": ["full_attention"] * 6}
    assert cut("gemma4_text", [2, 4, 5], **options).num_kv_shared_layers == 2


def test_rules_over_numbers_are_found_again_or_refused():
    period = {"num_hidden_layers": 8, "attn_layer_period": 4, "attn_layer_offset": 2, "expert_layer_period": 2}
    config = cut("jamba", [2, 3, 6, 7], **period, expert_layer_offset=1)  # attention, experts, attention, experts
    assert (config.attn_layer_period, config.attn_layer_offset) == (2, 0)
    assert config.layers_block_type == ["attention", "mamba", "attention", "mamba"]
    assert config.layers_num_experts == [1, 16, 1, 16]
    with pytest.raises(ModelError, match=r"expert_layer_period and expert_layer_offset give the kept blocks"):
        cut("jamba", [1, 2, 3, 5], **period, expert_layer_offset=1)
    ernie = cut("ernie4_5_moe", [0, 2, 5], num_hidden_layers=6, moe_layer_start_index=1, moe_layer_end_index=4)
    assert [ernie.moe_layer_start_index, ernie.moe_layer_end_index] == [1, 1]  # of 0, 2 and 5, only 2 was sparse


def test_qwens_dense_blocks_are_listed():
    config = cut("qwen2_moe", [0, 1, 3], num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3])
    assert (config.decoder_sparse_step, config.mlp_only_layers) == (1, [0, 2])  # 1 alone is every second and not listed


def test_gpt_neos_kinds_and_recurrent_gemmas_cycle():
    neo = cut("gpt_neo", [1, 3, 4], num_layers=6, attention_types=[[["global", "local"], 3]])
    assert neo.attention_types == [[["local", "local", "global"], 1]]
    gemma = cut("recurrent_gemma", [2, 3, 5], num_hidden_layers=6)
    assert gemma.block_types == ["attention", "recurrent", "attention"]


def test_overrides_of_single_blocks_move_with_them():
    options = {"num_hidden_layers": 6, "head_dim": 8, "global_head_dim": 16}
    options["layer_types"] = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    config = cut("gemma4_text", [0, 5], **options)
    assert [part.head_dim for part in config.per_layer_config] == [8, 16]
    assert config.to_dict()["per_layer_config"] == {"1": {"head_dim": 16}}


def test_all_blocks_leave_every_field_as_it_is():
    config = AutoConfig.for_model("gemma4_text", num_hidden_layers=6)
    before = config.to_dict()
    cut_fields(config, range(6), 6)
    assert config.to_dict() == before


def test_weights_outside_of_the_blocks_keep_the_slices_of_kept_blocks():
    weight = torch.arange(12.0).reshape(2, 6)  # 3 blocks with 2 columns each
    assert cut_slices("model.embed_tokens_per_layer.weight", weight, [0, 2], 3).tolist() == [
        [0, 1, 4, 5],
        [6, 7, 10, 11],
    ]
    assert cut_slices("model.per_layer_model_projection.weight", weight.T, [1], 3).T.tolist() == [[2, 3], [8, 9]]
    assert cut_slices("model.embed_tokens.weight", weight, [0, 2], 3) is weight


NOT_PER_BLOCK = {"attention_layers", "mtp_layers_block_type", "mtp_layer_types", "mtp_mlp_layer_types"}
"""GPT-Neo's is made from another field; the others are about blocks that these models do not run."""


def test_every_list_as_long_as_a_family_is_deep_has_a_known_meaning():
    unknown = []
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            text = AutoConfig.for_model(model_type).get_text_config(decoder=True)
        except Exception:  # composite ones that cannot be built from defaults
            continue
        depth = depth_of(text) if hasattr(text, "model_type") else None
        lists = {name for name, value in vars(text).items() if isinstance(value, list | tuple) and len(value) == depth}
        unknown += [f"{model_type}.{name}" for name in lists - LISTS - INDICES.keys() - NOT_PER_BLOCK]
    assert unknown == []


def test_depth_is_what_the_family_calls_so():
    assert depth_of(AutoConfig.for_model("longcat_flash", num_layers=6)) == 6  # num_hidden_layers is 12: two parts each
    assert depth_of(SimpleNamespace(model_type="bart")) is None
    assert set(DEPTHS) <= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def test_needs_are_met_by_the_cheapest_exchange():
    one_of = Need(None, frozenset({2, 5}), "-")
    assert complete([0, 1, 3], [one_of], 6, None) == (0, 2, 3)  # 1 moves to 2
    worth = torch.tensor([9.0, 8.0, 1.0, 7.0, 2.0, 3.0]).double()
    assert complete([0, 1, 3], [one_of], 6, worth) == (0, 1, 5)  # 7 is lost and 3 won
    assert complete([0, 2], [one_of], 6, worth) == (0, 2)
    reads = Need(frozenset({4}), frozenset({1}), "-")
    assert complete([3, 4], [reads], 6, None) == (3, 5)  # 4 moves to 5, a shorter way than 3 to 1
    assert reads.met([0, 3])
    assert not reads.met([0, 4])


def test_blocks_in_step_keep_their_place_within_a_period():
    worth = torch.tensor([0.0, 0, 0, 0, 5, 1, 6, 7]).double()
    assert in_step([4, 5, 6, 7], 4, 8, worth) == (4, 5, 6, 7)
    assert in_step([0, 4, 6], 2, 8, worth) == (4, 5, 6)  # even, odd, even
    assert in_step([1, 2, 3], 2, 8, None) == (0, 1, 2)
