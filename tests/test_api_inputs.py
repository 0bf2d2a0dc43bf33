"""What the calls of fedproxy.api are given stays as it is: modes of modules, tokenizers, weights."""

import copy
import json

import pytest
import torch

from fedproxy import api

TEXTS = ["Which color does a lemon have? It is yellow.", "Three and four make seven.", "The sky is blue."] * 2


@pytest.fixture(scope="module")
def loaded():
    return api.load("asset:tiny-llama")


@pytest.fixture
def model(loaded):
    """A model as one has it who tunes a part of it: dropout, some modules in training mode and some not."""
    model = copy.deepcopy(loaded[0]).train()
    model.config.attention_dropout = 0.9
    for block in model.model.layers:
        block.self_attn.attention_dropout = 0.9
    model.model.layers[0].eval()
    return model


def state(model):
    modes = {name: module.training for name, module in model.named_modules()}
    return modes, {name: tensor.clone() for name, tensor in model.state_dict().items()}, torch.get_rng_state()


def assert_same(model, before):
    modes, weights, drawn = before
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), drawn)


def test_evaluate_leaves_modes_of_single_modules(model, loaded, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "The lemon is", "target": "yellow"}\n' * 2)
    asked = api.Questions(["tiny_colors"], files={"own": tmp_path / "rows.jsonl"}, limit=2, max_new_tokens=2)
    before = state(model)
    found = api.evaluate(model, loaded[1], asked, progress=False)
    assert_same(model, before)
    assert found.scores == api.evaluate(loaded[0], loaded[1], asked, progress=False).scores  # without dropout


@pytest.mark.parametrize("name", ["block_influence", "angular", "cluster", "ffn_width"])
def test_compress_looks_at_a_model_in_training_without_its_dropout(model, loaded, name):
    before, method = state(model), {"name": name, "ratio": 0.5}
    found = api.compress(model, loaded[1], TEXTS, method).layer_map
    assert_same(model, before)
    known = api.compress(*loaded, TEXTS, method).layer_map
    assert (found.proxy_to_target, found.neurons) == (known.proxy_to_target, known.neurons)


@pytest.mark.parametrize("name", ["plug_in", "task_vector", "interpolate", "logit_offset", "none"])
def test_fuse_leaves_target_and_proxy_and_gives_a_model_to_use(model, loaded, name):
    proxy = api.compress(model, loaded[1], TEXTS, {"name": "block_influence", "ratio": 0.5})
    proxy.model.train()
    tuned = copy.deepcopy(proxy.model)
    before = [state(one) for one in (model, proxy.model, tuned)]
    fused = api.fuse(model, proxy, tuned, name)
    assert not any(module.training for module in fused.modules())
    for one, known in zip((model, proxy.model, tuned), before, strict=True):
        assert_same(one, known)


def test_what_cuts_calibration_text_stays_in_no_tokenizer(loaded, tmp_path):
    target, tokenizer = loaded
    before = tokenizer.backend_tokenizer.to_str()
    proxy = api.compress(target, tokenizer, TEXTS, {"name": "block_influence", "calibration": {"max_tokens": 4}})
    assert tokenizer.backend_tokenizer.to_str() == before
    proxy.save(tmp_path)
    assert json.loads((tmp_path / "proxy" / "tokenizer.json").read_text())["truncation"] is None


def test_a_tokenizer_keeps_the_cutting_that_it_was_saved_with(loaded):
    tokenizer = copy.deepcopy(loaded[1])
    tokenizer.backend_tokenizer.enable_truncation(9, stride=1)
    tokenizer.backend_tokenizer.enable_padding(length=7, pad_id=0, pad_token="<|pad|>")
    before = tokenizer.backend_tokenizer.to_str()
    api.compress(loaded[0], tokenizer, TEXTS, {"name": "block_influence"})
    assert tokenizer.backend_tokenizer.to_str() == before
