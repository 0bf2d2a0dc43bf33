"""Twelve families: proxies are what they say, load, generate with and without cache, and fuse back bit for bit."""

import pytest
import torch
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from fedproxy.errors import ModelError
from fedproxy.models import Decoder, state_sha256
from fedproxy.models.skipping import check_subset, skipping
from fedproxy.strategies.compression import Compressor
from fedproxy.strategies.compression.block_influence import block_influence
from fedproxy.strategies.fusion import Fusion
from tests.strategies.compression.architectures import FAMILIES, small_model, texts
from tests.strategies.compression.reference import influence

IDS = torch.randint(3, 61, (2, 14), generator=torch.Generator().manual_seed(3))
GENERATE = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits


def skip_by_hand(model, gone):
    """Return logits with the outputs of some blocks replaced by their inputs: the blocks run, for nothing."""
    handles = [
        block.register_forward_hook(
            lambda _, args, kwargs, out: args[0] if args else kwargs["hidden_states"], with_kwargs=True
        )
        for index, block in enumerate(Decoder.of(model).blocks)
        if index in gone
    ]
    found = logits(model)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_no_compression_gives_the_same_logits_bit_for_bit(family):
    model = small_model(family)
    proxy, layer_map = Compressor.by_name("none")().compress(model)
    assert layer_map.proxy_to_target == tuple(range(6))
    assert torch.equal(logits(proxy), logits(model))
    assert proxy.get_input_embeddings().weight.data_ptr() != model.get_input_embeddings().weight.data_ptr()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_proxy_is_the_target_with_blocks_skipped_and_an_ordinary_checkpoint(family, tmp_path):
    model = small_model(family)
    proxy, layer_map = Compressor.by_name("block_influence")(ratio=0.5).compress(model, [texts()])
    gone = set(range(6)) - set(layer_map.proxy_to_target)
    assert len(gone) == 3
    proxy.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.num_hidden_layers == len(Decoder.of(loaded)) == 3
    assert type(loaded) is type(model)
    assert torch.allclose(logits(loaded), skip_by_hand(model, gone), atol=1e-5)
    assert not torch.allclose(logits(loaded), logits(model), atol=1e-2)  # not silently still the original
    cached = loaded.generate(IDS, attention_mask=torch.ones_like(IDS), use_cache=True, **GENERATE)
    plain = loaded.generate(IDS, attention_mask=torch.ones_like(IDS), use_cache=False, **GENERATE)
    assert torch.equal(cached, plain)
    assert cached.shape == (2, 24)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_trained_fuses_to_the_target_bit_for_bit(family):
    model = small_model(family)
    proxy, layer_map = Compressor.by_name("random")(ratio=0.5).compress(model)
    for mode in ("replace", "delta"):
        fused = Fusion.by_name("plug_in")(mode=mode).fuse(model, proxy, proxy, layer_map)
        assert state_sha256(fused) == state_sha256(model)
        assert torch.equal(logits(fused), logits(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_influence_equals_the_reference_on_unpadded_texts(family):
    model = small_model(family)
    assert torch.allclose(block_influence(Decoder.of(model), [texts()]), influence(model, texts()), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_skipping_equals_skipping_by_hand_and_leaves_no_trace(family):
    model = small_model(family)
    decoder = Decoder.of(model)
    with skipping(decoder, [0, 2, 5]):
        found = logits(model)
    assert torch.allclose(found, skip_by_hand(model, {0, 2, 5}), atol=1e-6)
    assert not any("forward" in vars(block) or block._forward_hooks for block in decoder.blocks)


@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma2"])
def test_texts_up_to_the_models_positions_pass(family):
    model = small_model(family)
    ids = torch.randint(3, 61, (1, 128), generator=torch.Generator().manual_seed(0))
    assert block_influence(Decoder.of(model), [ids]).isfinite().all()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_bfloat16(family):
    model = small_model(family).to(torch.bfloat16)
    proxy, layer_map = Compressor.by_name("block_influence")(ratio=0.5).compress(model, [texts()])
    assert proxy.dtype == torch.bfloat16
    fused = Fusion.by_name("plug_in")().fuse(model, proxy, proxy, layer_map)
    assert state_sha256(fused) == state_sha256(model)


def test_a_family_whose_blocks_depend_on_their_place_is_refused():
    model = small_model("gpt2")
    model.config.scale_attn_by_inverse_layer_idx = True  # attention is divided by the block's number
    for index, block in enumerate(model.transformer.h):
        block.attn.scale_attn_by_inverse_layer_idx, block.attn.scaling = True, 1.0 / (index + 1)
    with pytest.raises(ModelError, match=r"GPT2LMHeadModel: its blocks work differently in another place .*choose"):
        Compressor.by_name("random")(keep=[0, 4, 5]).compress(model)


def test_a_proxy_of_other_blocks_is_noticed():
    model = small_model("llama")
    decoder = Decoder.of(model)
    check_subset(decoder, decoder.subset([0, 3]), [0, 3])
    with pytest.raises(ModelError, match="work differently in another place"):
        check_subset(decoder, decoder.subset([0, 4]), [0, 3])


def test_other_kinds_of_model_are_refused():
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2))
    with pytest.raises(ModelError, match="is an encoder-decoder model; FedProxy needs a decoder-only causal LM"):
        Compressor.by_name("random")().compress(t5)
