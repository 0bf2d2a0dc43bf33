"""Cuts of families whose configurations say per block what a block is: lists, block numbers, rules over numbers."""

import logging
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from fedproxy.errors import FedProxyError, ModelError
from fedproxy.models import Decoder
from fedproxy.models.anonymity import strip_origin
from fedproxy.strategies.compression import Compressor
from fedproxy.strategies.fusion import Fusion
from tests.strategies.compression.families import (
    BASE,
    CUTS,
    DELTA,
    END,
    GEMMA3N,
    GEMMA4,
    HEAD,
    MAMBA,
    MOE,
    SLICED,
    F,
    L,
    S,
    family_model,
)

IDS = torch.randint(10, 61, (3, 24), generator=torch.Generator().manual_seed(3))  # windows are 5
GENERATE = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
FORMS = (lambda hidden: hidden, lambda hidden: (hidden,), lambda hidden: (hidden, None))


@torch.no_grad()
def without(model, gone):
    """Return logits of a model whose other blocks hand on what they are given, in the form that its family takes."""
    blocks = Decoder.of(model).blocks
    for form in FORMS:
        for index in gone:
            blocks[index].forward = lambda *args, form=form, **kwargs: form(
                args[0] if args else kwargs["hidden_states"]
            )
        try:
            return model(input_ids=IDS, use_cache=False).logits
        except Exception:  # another form is what the family takes
            continue
        finally:
            for index in gone:
                del blocks[index].forward
    raise AssertionError("no form fits")


def saved_and_loaded(proxy, folder):
    """Return what a client loads: a checkpoint freed of its origin."""
    proxy.save_pretrained(folder)
    strip_origin(folder, proxy, SimpleNamespace(name_or_path=""))
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return loaded.eval()


def check_cut(model, proxy, layer_map, folder):
    """Check a proxy by hand against its target: blocks, logits, generation, special tokens, fusion."""
    loaded, kept = saved_and_loaded(proxy, folder), layer_map.proxy_to_target
    own, theirs = Decoder.of(loaded).blocks, Decoder.of(model).blocks
    assert len(own) == len(kept)
    for new, old in enumerate(kept):
        weights = theirs[old].state_dict()
        assert own[new].state_dict().keys() == weights.keys()
        assert all(torch.equal(tensor, weights[name]) for name, tensor in own[new].state_dict().items())
    with torch.no_grad():
        found = loaded(input_ids=IDS, use_cache=False).logits
    assert torch.allclose(found, without(model, set(range(len(theirs))) - set(kept)), atol=2e-4 * found.abs().max())
    cached, plain = (
        loaded.generate(IDS[:, :9], attention_mask=torch.ones_like(IDS[:, :9]), use_cache=cache, **GENERATE)
        for cache in (True, False)
    )
    assert torch.equal(cached, plain)
    assert loaded.config.get_text_config().eos_token_id == END
    assert loaded.generation_config.eos_token_id == model.generation_config.eos_token_id
    fused = Fusion.by_name("plug_in")().fuse(model, proxy, proxy, layer_map).state_dict()
    assert all(torch.equal(tensor, fused[name]) for name, tensor in model.state_dict().items())


FAST = ["llama4, all sparse", "gemma4", "gemma3n", "gemma3 with a tower", "bamba", "gpt_neo", "zamba2", "qwen3_moe"]
CASES = [
    pytest.param(name, kept, id=f"{name} {kept}", marks=() if name in FAST and kept == cuts[0] else pytest.mark.slow)
    for name, (_, _, cuts) in CUTS.items()
    for kept in cuts
]


@pytest.mark.parametrize(("name", "kept"), CASES)
def test_kept_blocks_are_the_targets_and_the_proxy_is_the_target_without_the_others(name, kept, tmp_path):
    model = family_model(CUTS[name][0], **CUTS[name][1])
    proxy, layer_map = Compressor.by_name("uniform")(keep=kept).compress(model)
    assert layer_map.proxy_to_target == tuple(kept)
    check_cut(model, proxy, layer_map, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("compressor", ["none", "block_influence", "cluster"])
@pytest.mark.parametrize("name", CUTS)
def test_every_family_can_be_halved_without_blocks_named_by_hand(name, compressor, tmp_path):
    model = family_model(CUTS[name][0], **CUTS[name][1])
    options = {} if compressor == "none" else {"ratio": 0.5}
    proxy, layer_map = Compressor.by_name(compressor)(**options).compress(model, [IDS])
    depth = len(Decoder.of(model))
    assert len(layer_map.proxy_to_target) == (depth if compressor == "none" else depth // 2)
    check_cut(model, proxy, layer_map, tmp_path)


def test_no_compression_of_gemma_4_can_be_read_back(tmp_path):
    model = family_model("gemma4_text", **GEMMA4)
    proxy, layer_map = Compressor.by_name("none")().compress(model)
    check_cut(model, proxy, layer_map, tmp_path)


OLMO = {"num_hidden_layers": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 16}


@pytest.mark.parametrize(
    ("model_type", "options", "kept", "says"),
    [
        (
            "olmo_hybrid",
            OLMO,
            [3, 7],
            r"blocks \[3, 7\]: ValueError: OLMoHybrid expects at least one 'linear_attention' layer",
        ),
        ("gemma3n_text", GEMMA3N, [0, 1, 6, 7], r"needs block 4, which block 6 reads keys and values of"),
        ("gemma4_text", GEMMA4, [0, 1], r"reads layer_types of blocks \[0, 1\] back as \['sliding_attention', 'full_"),
        ("zamba2", CUTS["zamba2"][1], [0, 2], r"needs block 5, which the other hybrid blocks hold an adapter for"),
        (
            "modernbert-decoder",
            {"local_attention": 10},
            [1, 4],
            r"block 1 would work differently in place 0 \(attn_norm",
        ),
        ("jamba", CUTS["jamba"][1], [1, 2, 3, 5], r"no values of expert_layer_period and expert_layer_offset"),
        ("diffllama", {}, [1, 4], r"block 1 would work differently in place 0 \(self_attn.lambda_init is 0\.2"),
        ("bamba", CUTS["bamba"][1], [0, 1], r"only be called on Attention layers"),
    ],
)
def test_a_cut_that_cannot_work_is_refused_in_one_line(model_type, options, kept, says):
    model = family_model(model_type, **options)
    with pytest.raises(FedProxyError, match=says) as caught:
        Compressor.by_name("uniform")(keep=kept).compress(model)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("keep other blocks (compression.keep) or choose compression.name=none")


@pytest.mark.parametrize(
    ("model_type", "options", "best", "kept"),
    [
        # The best three are linear blocks; an attention block takes the lowest one's place, of 2 and 5 the better.
        ("bamba", MAMBA | {"attn_layer_indices": [2, 5]}, [9, 8, 2, 7, 1, 3], (0, 1, 5)),
        ("qwen3_next", MOE | DELTA | HEAD | {"shared_expert_intermediate_size": 16, "layer_types": [L, L, F] * 2},
         [9, 8, 3, 7, 1, 2], (0, 1, 2)),
        # Blocks 4 and 5 read keys and values of 2 and 3: without them, the readers have to go.
        ("gemma4_text", GEMMA4 | SLICED | {"num_kv_shared_layers": 2, "layer_types": [S, F] * 3},
         [1, 2, 3, 4, 9, 8], (2, 3, 5)),
        # The first block of ModernBERT's decoder has no norm.
        ("modernbert-decoder", {"local_attention": 10, "global_attn_every_n_layers": 3}, [1, 2, 3, 4, 5, 6], (0, 4, 5)),
    ],
)  # fmt: skip
def test_the_default_compressor_keeps_what_a_family_needs_and_says_so(model_type, options, best, kept, caplog):
    model = family_model(model_type, **options)
    with caplog.at_level(logging.WARNING):
        _, layer_map = Compressor.by_name("block_influence")(ratio=0.5).build(model, torch.tensor(best).double())
    assert layer_map.proxy_to_target == kept


def test_a_selection_that_works_stays_as_it_is_and_one_that_does_not_is_named(caplog):
    model = family_model("bamba", **CUTS["bamba"][1])
    compressor = Compressor.by_name("block_influence")(ratio=0.5)
    with caplog.at_level(logging.WARNING):
        _, first = compressor.build(model, torch.tensor([9.0, 1, 8, 2, 3, 7]).double())
    assert (first.proxy_to_target, caplog.messages) == ((0, 2, 5), [])
    with caplog.at_level(logging.WARNING):
        compressor.build(model, torch.tensor([9.0, 8, 1, 7, 2, 3]).double())
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("compression: blocks [0, 1, 5] are kept instead, since BambaForCausalLM fails")


def test_plans_name_a_set_of_blocks_that_can_be_built():
    model = family_model("gemma4_text", **GEMMA4)
    assert Compressor.by_name("block_influence")(ratio=0.5).places(Decoder.of(model)) == (0, 1, 2)
    assert Compressor.by_name("block_influence")(ratio=0.7).places(Decoder.of(model)) == (0, 2)
    with pytest.raises(ModelError, match="reads layer_types of blocks"):
        Compressor.by_name("uniform")(keep=[0, 1]).outline(Decoder.of(model))


def test_what_is_not_per_block_stays_however_long_it_is():
    lists = {"eos_token_id": END, "some_tokens": [1, 2, 3, 4, 5, 6], "some_bounds": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]}
    model = family_model("llama", **lists, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "six": [1] * 6})
    config = Decoder.of(model).subset_config([4, 5])
    assert {name: getattr(config, name) for name in lists} == lists
    assert config.rope_parameters["six"] == [1] * 6
    assert config.num_hidden_layers == 2
    assert BASE["eos_token_id"] == END
