"""Three models as one: logits by hand, generation against a plain loop without cache, files, vocabularies."""

import json

import pytest
import torch

from fedproxy.errors import ModelError
from fedproxy.models import Decoder, load_model
from fedproxy.models.cache_name import CACHE
from fedproxy.models.logit_offset import LogitOffsetModel, offset_logits, require_same_vocabulary

FAMILIES = ("llama", "gemma2", "gpt2", "opt")


@pytest.fixture
def three(make_model):
    """Return a function of the family that gives target, tuned proxy and untuned proxy."""

    def make(family):
        target = make_model(family, layers=4)
        untuned, tuned = Decoder.of(target).subset((0, 3)), Decoder.of(target).subset((0, 3))
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in Decoder.of(tuned).blocks.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        return target, tuned, untuned

    return make


def plain_generate(three, ids, steps, alpha):
    """Greedy decoding of one row, three whole forward passes a step, no cache."""
    target, tuned, untuned = three
    for _ in range(steps):
        logits = [model(ids, use_cache=False).logits[0, -1] for model in (target, tuned, untuned)]
        ids = torch.cat([ids, (logits[0] + alpha * (logits[1] - logits[2])).argmax().view(1, 1)], dim=1)
    return ids


def test_logits_by_hand():
    target = torch.tensor([1.0, 2.0, 3.0, 4.0])
    # over the two shared entries 1 + .5 (5 - 3) = 2 and 2 + .5 (1 - 5) = 0; the target's two further ones stay
    offset = offset_logits(target, torch.tensor([5.0, 1.0]), torch.tensor([3.0, 5.0]), alpha=0.5)
    assert offset.tolist() == [2.0, 0.0, 3.0, 4.0]
    # entries that only the proxies have do not exist
    wide = offset_logits(target[:1], torch.tensor([5.0, 1.0]), torch.tensor([3.0, 5.0]), alpha=1.0)
    assert wide.tolist() == [3.0]
    assert target.tolist() == [1.0, 2.0, 3.0, 4.0]


def test_half_precision_is_cast_once():
    # -256 + (256 - .5) = -.5; in bfloat16 throughout, 255.5 would round to 256 and the sum to 0
    low = [torch.tensor([value], dtype=torch.bfloat16) for value in (-256.0, 256.0, 0.5)]
    assert offset_logits(*low, alpha=1.0).tolist() == [-0.5]
    assert offset_logits(*low, alpha=1.0).dtype == torch.bfloat16


@pytest.mark.parametrize("family", FAMILIES)
def test_an_untuned_proxy_leaves_the_targets_logits(three, family):
    target, _, untuned = three(family)
    ids = torch.tensor([[5, 9, 3, 7], [8, 4, 6, 10]])
    joined = LogitOffsetModel(target, untuned, untuned)
    assert torch.allclose(joined(ids).logits, target(ids).logits, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_generation_with_caches_equals_a_plain_loop_without(three, family):
    models = three(family)
    joined = LogitOffsetModel(*models, alpha=0.7)
    ids = torch.tensor([[5, 9, 3, 7, 11]])
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = joined.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(found, plain_generate(models, ids, 8, 0.7))
    alone = models[0].generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert not torch.equal(found, alone)  # else the proxies would not have mattered


@torch.no_grad()
def test_beams_and_left_padding_agree_with_no_cache(three):
    joined = LogitOffsetModel(*three("llama"))
    ids = torch.tensor([[0, 0, 3, 7, 11], [5, 9, 3, 7, 4]])
    mask = (ids != 0).long()
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 3}
    cached = joined.generate(ids, attention_mask=mask, **options)
    assert torch.equal(cached, joined.generate(ids, attention_mask=mask, use_cache=False, **options))


@torch.no_grad()
def test_each_model_has_its_own_cache_and_a_foreign_one_is_refused(three):
    joined = LogitOffsetModel(*three("llama"))
    ids = torch.tensor([[5, 9, 3, 7]])
    first = joined(ids[:, :3], use_cache=True)
    assert [len(view.layers) for view in first[CACHE].views] == [4, 2, 2]
    whole = joined(ids).logits[:, -1]
    for name in ("past_key_values", "cache"):  # what it is called before and from transformers 5.24 on
        caches = {name: joined(ids[:, :3], use_cache=True)[CACHE]}
        assert torch.allclose(joined(ids[:, 3:], use_cache=True, **caches).logits[:, -1], whole, atol=1e-5)
    foreign = joined.target(ids, use_cache=True)[CACHE]
    with pytest.raises(ModelError, match=f"{CACHE} holds another model's tokens; pass what forward returned"):
        joined(ids, use_cache=True, **{CACHE: foreign})


def test_saved_folder_names_three_models_and_loads(three, tmp_path):
    target, tuned, untuned = three("llama")
    target.save_pretrained(tmp_path / "owner")
    untuned.save_pretrained(tmp_path / "run" / "proxy")
    target, untuned = load_model(tmp_path / "owner"), load_model(tmp_path / "run" / "proxy")
    joined = LogitOffsetModel(target, tuned, untuned, alpha=0.5)
    joined.save_pretrained(tmp_path / "run" / "fused")
    content = json.loads((tmp_path / "run" / "fused" / "config.json").read_text())
    assert content == {
        "model_type": "logit_offset", "alpha": 0.5, "target": "../../owner", "tuned": "./tuned", "untuned": "../proxy",
    }  # fmt: skip
    assert not (tmp_path / "run" / "fused" / "model.safetensors").exists()
    (tmp_path / "run").rename(tmp_path / "moved")
    again = load_model(tmp_path / "moved" / "fused")
    ids = torch.tensor([[5, 9, 3, 7]])
    assert torch.equal(again(ids).logits, joined(ids).logits)
    (tmp_path / "owner").rename(tmp_path / "gone")
    with pytest.raises(ModelError, match=r"the target model is not in ../../owner; put it back, or correct the key"):
        load_model(tmp_path / "moved" / "fused")


def test_a_target_far_from_the_run_is_named_by_its_full_path(three, tmp_path):
    target, tuned, untuned = three("llama")
    target.save_pretrained(tmp_path / "cache" / "owner")
    joined = LogitOffsetModel(load_model(tmp_path / "cache" / "owner"), tuned, untuned)
    joined.save_pretrained(tmp_path / "runs" / "mine" / "fused")
    content = json.loads((tmp_path / "runs/mine/fused/config.json").read_text())
    assert content["target"] == str((tmp_path / "cache" / "owner").resolve())
    (tmp_path / "runs/mine").rename(tmp_path / "mine")  # to another depth
    assert load_model(tmp_path / "mine" / "fused").alpha == 1.0


@torch.no_grad()
def test_tokens_that_only_the_target_has_reach_the_proxies_as_entry_0(three):
    target, tuned, untuned = three("llama")
    target.resize_token_embeddings(64)
    joined = LogitOffsetModel(target, tuned, untuned)
    ids, known = torch.tensor([[5, 63, 3]]), torch.tensor([[5, 0, 3]])
    change = (tuned(known).logits - untuned(known).logits).float()
    expected = target(ids).logits
    expected[..., :61] += change
    assert torch.allclose(joined(ids).logits, expected, atol=1e-5)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 62}
    padded = torch.tensor([[62, 62, 5, 63, 3], [4, 8, 5, 7, 3]])
    mask = (padded != 62).long()
    bias = {(63,): 1e4}  # the target has an entry 63 alone; every answer is that
    found = joined.generate(padded, attention_mask=mask, sequence_bias=bias, **options)
    assert (found[:, 5:] == 63).all()


def test_a_broken_configuration_is_one_line(tmp_path):
    for content, match in (
        ('{"model_type": "logit_offset", "alpha": 1}', r"config.json: target must name a folder or a hub id"),
        ('{"model_type": "logit_offset", "alpha": NaN}', r"alpha must be a finite number.*, got nan; run fusion again"),
        ('{"model_type": "logit_offset", "alpha": 1e300}', r"alpha must be a finite number in float32, got 1e\+300"),
        ('{"model_type": "logit_offset", "alpha": 1, "target": "./%s"}' % ("x" * 5000), "the target model is not in"),
        ('{"model_type": "logit_offset", "alpha": "1", "target": "."}', r"alpha must be a finite number"),
        # A wrapper of itself would be loaded for ever.
        ('{"model_type": "logit_offset", "alpha": 1, "target": ".", "tuned": ".", "untuned": "."}', "is no causal LM"),
    ):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ModelError, match=match):
            load_model(tmp_path)


def test_vocabularies_may_differ_in_padding_alone(three, make_model):
    target, tuned, untuned = three("llama")
    wider = make_model("llama", layers=2)
    wider.resize_token_embeddings(64)
    with pytest.raises(ModelError, match="the tuned proxy has 61 vocabulary entries, the untuned one 64"):
        LogitOffsetModel(target, tuned, wider)
    target.resize_token_embeddings(64)
    logits = LogitOffsetModel(target, tuned, untuned)(torch.tensor([[5, 9, 3]])).logits
    assert torch.equal(logits[..., 61:], target(torch.tensor([[5, 9, 3]])).logits[..., 61:])
    require_same_vocabulary({"a": 0, "b": 1, "<pad>": 2}, {"a": 0, "b": 1})
    with pytest.raises(ModelError, match=r"different vocabularies \(token 'b' is 1 in one and 2 in the other\)"):
        require_same_vocabulary({"a": 0, "b": 1}, {"a": 0, "c": 1, "b": 2})
