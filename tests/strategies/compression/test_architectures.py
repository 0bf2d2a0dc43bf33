"""Twelve families: proxies are what they say, load, generate with and without cache, and fuse back bit for bit."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from fedproxy.errors import ModelError
from fedproxy.models import Decoder, state_sha256
from fedproxy.models.probing import check_decoder, check_subset
from fedproxy.models.skipping import skipping
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
        block.attn.scale_attn_by_inverse_layer_idx, block.attn.scaling = True, 8**-0.5 / (index + 1)
    with pytest.raises(ModelError, match=r"GPT2LMHeadModel: block 4 would work differently in place 1 \(attn\.scaling"):
        Compressor.by_name("random")(keep=[0, 4, 5]).compress(model)

    with pytest.raises(ModelError, match="block 1 would work differently in place 0"):  # 0, 2, 3 and 5 are copies
        Compressor.by_name("cluster")(keep=[1, 4], share=True).compress(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_blocks_work_in_every_place(family):
    model = small_model(family)
    proxy, layer_map = Compressor.by_name("cluster")(keep=[1, 4], share=True).compress(model)
    assert layer_map.proxy_to_target == (1, 1, 1, 4, 4, 4)
    assert Decoder.of(proxy).blocks[5].state_dict().keys() == Decoder.of(model).blocks[4].state_dict().keys()


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


EVERY_WAY = [("none", {}), ("random", {"keep": [1, 4, 5]}), ("cluster", {"keep": [1, 4], "share": True})]


def of_config(model_type, **options):
    """Return a small random model of a family outside the list, with weights large enough that every block matters."""
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6}
    config = AutoConfig.for_model(model_type, **{**sizes, "num_attention_heads": 4, "pad_token_id": 0, **options})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.2).add_(1.0 if parameter.ndim == 1 else 0.0)
    return model.eval()


def refusal(capfd, model, name, **options):
    """Return the one line with which a compressor refuses a model, having printed nothing else."""
    capfd.readouterr()
    with pytest.raises(ModelError) as caught:
        Compressor.by_name(name)(**options).compress(model, [texts()])
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
    return str(caught.value)


@pytest.mark.parametrize(("name", "options"), [*EVERY_WAY, ("ffn_width", {}), ("block_influence", {})])
def test_a_bidirectional_model_is_refused_by_every_compressor(name, options, capfd):
    found = refusal(capfd, of_config("bert"), name, **options)
    assert found.startswith("BertLMHeadModel is not causal: logits change by")
    assert found.endswith("give another target.path, a decoder-only causal LM")


@pytest.mark.parametrize(("name", "options"), [*EVERY_WAY, ("block_influence", {})])
def test_a_model_that_cannot_go_on_from_its_state_is_refused(name, options, capfd):
    model = of_config("rwkv", attention_hidden_size=32, context_length=64)
    assert refusal(capfd, model, name, **options).startswith("RwkvForCausalLM generates otherwise with its cache")


def test_blocks_without_which_the_cache_fails_cannot_all_go(capfd):
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    linear = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
    model = of_config(
        "qwen3_next",
        **{**sizes, **linear, "linear_value_head_dim": 8, "num_key_value_heads": 2},
        shared_expert_intermediate_size=16,
    )
    assert [i for i, kind in enumerate(model.config.layer_types) if kind == "full_attention"] == [3]
    Compressor.by_name("random")(keep=[1, 3, 5]).compress(model)
    found = refusal(capfd, model, "random", keep=[1, 4, 5])
    assert found.startswith("Qwen3NextForCausalLM fails on a few tokens: `get_seq_length`")


def test_a_cache_that_is_wrong_is_noticed(monkeypatch):
    model = small_model("llama")
    check_decoder(model, remedy="-")
    rotary = type(model.model.rotary_emb).forward

    def late(self, x, position_ids):  # the step with a cache takes its token for the second
        return rotary(self, x, torch.ones_like(position_ids) if position_ids.shape[1] == 1 else position_ids)

    monkeypatch.setattr(type(model.model.rotary_emb), "forward", late)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM generates otherwise with its cache: .* differ by .*; -$"):
        check_decoder(model, remedy="-")
