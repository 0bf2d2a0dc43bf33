"""Block influence against a plain float64 reference; which blocks go, and what is refused."""

import pytest
import torch

from fedproxy.errors import ConfigError, DataError, ModelError
from fedproxy.models import Decoder, state_sha256
from fedproxy.strategies.compression import Compressor, LayerMap
from fedproxy.strategies.compression.block_influence import block_influence
from fedproxy.strategies.compression.removal import keep_count, kept_blocks

FAMILIES = ["llama", "qwen2", "gemma2", "opt", "gpt2"]


def batch(seed=0, padded=True):
    ids = torch.randint(3, 61, (3, 7), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(3, 7, dtype=torch.long)
    if padded:
        mask[1, 5:] = 0
        mask[2, 2:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def reference(model, batches):
    """Return Eq (4) from all hidden states, kept at once, float64; blocks' outputs are caught before the final norm."""
    decoder = Decoder.of(model)
    sums, tokens = torch.zeros(len(decoder), dtype=torch.float64), 0
    for one in batches:
        inputs, outputs = {}, {}
        handles = []
        for i, block in enumerate(decoder.blocks):

            def keep(module, args, kwargs, output, i=i, inputs=inputs, outputs=outputs):
                inputs[i] = args[0] if args else kwargs["hidden_states"]
                outputs[i] = output if isinstance(output, torch.Tensor) else output[0]

            handles.append(block.register_forward_hook(keep, with_kwargs=True))
        with torch.no_grad():
            model(**one)
        for handle in handles:
            handle.remove()
        mask = one["attention_mask"].bool()
        tokens += int(mask.sum())
        for i in inputs:
            x, y = inputs[i].double()[mask], outputs[i].double()[mask]
            sums[i] += ((x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))).sum()
    return 1 - sums / tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_the_reference_and_ignore_padding(make_model, family):
    model = make_model(family, layers=5)
    batches = [batch(0), batch(1, padded=False)]
    scores = block_influence(Decoder.of(model), batches)
    assert scores.dtype == torch.float64
    assert torch.allclose(scores, reference(model, batches), atol=1e-6)
    changed = batch(0)
    changed["input_ids"][2, 4:] = 9  # padding
    assert torch.allclose(block_influence(Decoder.of(model), [changed, batches[1]]), scores, atol=1e-6)


def test_last_block_is_taken_before_the_final_norm(make_model):
    # hidden_states[-1] of transformers is after the norm: with a norm that flips signs its cosine would be wrong
    model = make_model("llama", layers=3)
    before = block_influence(Decoder.of(model), [batch()])
    model.model.norm.weight.data.neg_()
    assert torch.equal(block_influence(Decoder.of(model), [batch()]), before)


def test_a_block_that_does_nothing_has_no_influence_and_goes_first(make_model):
    model = make_model("llama", layers=4)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        model.get_submodule(f"model.layers.2.{name}").weight.data.zero_()
    scores = block_influence(Decoder.of(model), [batch()])
    assert scores[2] == pytest.approx(0, abs=1e-7)
    proxy, layer_map = Compressor.by_name("block_influence")(ratio=0.25).compress(model, [batch()])
    assert layer_map.proxy_to_target == (0, 1, 3)
    # removing a block that does nothing changes nothing
    assert torch.allclose(proxy(batch()["input_ids"]).logits, model(batch()["input_ids"]).logits, atol=1e-6)


def test_hooks_are_gone_afterwards(make_model):
    model = make_model("llama")
    block_influence(Decoder.of(model), [batch()])
    assert not any(block._forward_hooks for block in Decoder.of(model).blocks)


@pytest.mark.parametrize(
    ("depth", "ratio", "kept"),
    # keep = max(1, L - floor(L * ratio + 1e-9)); 10 * 0.3 is 3.0000000000000004 or 2.9999999999999996 in floats
    [
        (32, 0.5, 16),
        (30, 0.27, 22),
        (10, 0.3, 7),
        (30, 0.1, 27),
        (3, 0.99, 1),
        (1, 0.5, 1),
        (6, 0.0, 6),
        (100, 0.29, 71),
    ],
)
def test_kept_counts(depth, ratio, kept):
    assert keep_count(depth, ratio) == kept


def test_lowest_scores_go_and_ties_delete_the_lower_index():
    scores = torch.tensor([0.3, 0.1, 0.2, 0.1, 0.1])
    assert kept_blocks(scores, 2) == (0, 2, 4)
    assert kept_blocks(scores, 0) == (0, 1, 2, 3, 4)
    assert kept_blocks(scores, 4) == (0,)


def test_calibration_may_be_plain_token_ids(make_model):
    model = make_model("llama")
    ids = batch(padded=False)["input_ids"]
    assert torch.equal(
        block_influence(Decoder.of(model), [ids]), block_influence(Decoder.of(model), [batch(padded=False)])
    )


def test_none_gives_the_target_bit_for_bit(make_model):
    model = make_model("llama")
    proxy, layer_map = Compressor.by_name("none")().compress(model)
    assert layer_map == LayerMap((0, 1, 2), state_sha256(model))
    ids = batch()["input_ids"]
    assert torch.equal(proxy(ids).logits, model(ids).logits)


def test_target_stays_as_it_is(make_model):
    model = make_model("llama", layers=4)
    before = state_sha256(model)
    Compressor.by_name("block_influence")(ratio=0.5).compress(model, [batch()])
    assert state_sha256(model) == before


def test_bad_input_is_one_line(make_model):
    with pytest.raises(ConfigError, match=r"compression.ratio must be in \[0, 1\), got 1.0"):
        Compressor.by_name("block_influence")(ratio=1.0)
    with pytest.raises(DataError, match="the text holds no token"):
        Compressor.by_name("block_influence")(ratio=0.5).compress(make_model("llama"), [])
    broken = make_model("llama")
    broken.model.layers[1].mlp.down_proj.weight.data.fill_(float("nan"))
    with pytest.raises(ModelError, match="hidden states of block 1 are not finite"):
        Compressor.by_name("block_influence")(ratio=0.5).score(Decoder.of(broken), [batch()])
    with pytest.raises(ModelError, match="LlamaForCausalLM: its logits are not numbers; load it in another"):
        Compressor.by_name("none")().compress(broken)


def test_layer_map_survives_the_disk(tmp_path):
    for neurons in (None, ((0, 2), (1, 3))):
        layer_map = LayerMap((0, 2, 2), "ab" * 32, neurons)
        layer_map.save(tmp_path / "map.json")
        assert LayerMap.load(tmp_path / "map.json") == layer_map
