"""Slots of a decoder: whatever goes in and out of them, every answer is that of its prompt alone."""

import inspect

import pytest
import torch

from fedproxy.evaluation import decoding
from fedproxy.evaluation.decoding import SlotDecoder, token_bytes
from fedproxy.evaluation.generation import generate
from fedproxy.models.cache_name import CACHE

from .test_generation import END, one_by_one, random_prompts


def answers(model, prompts, limits, slots, monkeypatch, batch_tokens=64):
    monkeypatch.setattr(decoding, "SLOTS", slots)
    counts = []
    with torch.inference_mode():
        size = token_bytes(model, prompts)
        decoder = SlotDecoder(model, size, batch_tokens)
        found = decoder.answers(prompts, limits, lambda tokens: tokens[-1] == END, counts.append)
    assert counts == list(range(1, len(prompts) + 1))
    return [row[:-1] if row[-1] == END else row for row in found]


@pytest.mark.parametrize("slots", [1, 2, 3, 8, 40])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rows_that_come_and_go_do_not_disturb_others(make_model, family, slots, monkeypatch):
    """Limits of 1 to 30 tokens make rows end at all times, in the step after they were read as well."""
    model, prompts = make_model(family), random_prompts(23, seed=slots)
    limits = [1 + (7 * index) % 30 for index in range(len(prompts))]
    assert answers(model, prompts, limits, slots, monkeypatch) == one_by_one(model, prompts, limits)


def test_columns_that_nobody_reads_are_let_go(make_model, monkeypatch):
    """A decoder that kept all columns of 40 prompts one after the other would have many more than one answer needs."""
    model, prompts = make_model("llama"), random_prompts(40, seed=1)
    most, update = [], decoding._SlotLayer.update

    def watched(layer, *given, **options):
        found = update(layer, *given, **options)
        most.append(layer._room[0].shape[-2])
        return found

    monkeypatch.setattr(decoding, "_SPARE", 4)
    monkeypatch.setattr(decoding._SlotLayer, "update", watched)
    limits = [20] * len(prompts)
    assert answers(model, prompts, limits, 2, monkeypatch) == one_by_one(model, prompts, limits)
    assert max(most) < 3 * (20 + 20)


def test_a_cache_has_no_more_bytes_than_it_may(make_model, monkeypatch):
    model, prompts = make_model("llama"), random_prompts(12)
    size = token_bytes(model, prompts)
    config = model.config
    heads = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    assert size == 2 * 4 * heads * config.num_hidden_layers  # keys and values, float32
    monkeypatch.setattr(decoding, "_CACHE_BYTES", 0)
    rooms, place = [], decoding._SlotLayer.place

    def watched(layer, slots, count, given):
        rooms.append((count, given.keys.shape[-2] if not layer.length else 0))
        place(layer, slots, count, given)

    monkeypatch.setattr(decoding._SlotLayer, "place", watched)
    answers(model, prompts, [8] * 12, 32, monkeypatch)
    budget = sum(parameter.nbytes for parameter in model.parameters()) // 4 // size
    assert max(rooms)[0] > 1
    assert all(count == 1 or count * (columns + 8) <= budget for count, columns in rooms)


@pytest.mark.parametrize("family", ["gemma2"])
def test_windows_are_left_to_generate(make_model, family):
    with torch.inference_mode():
        assert token_bytes(make_model(family), random_prompts()) is None


def test_a_model_that_does_not_take_the_cache_at_its_word_is_left_to_generate(make_model, monkeypatch):
    """It takes the last column for the only one: alone it answers rightly."""
    model, prompts = make_model("llama"), random_prompts()
    plain, forward = one_by_one(model, prompts, [6] * 12), type(model).forward

    def forgets(self, input_ids=None, **options):
        if any(isinstance(layer, decoding._SlotLayer) for layer in getattr(options.get(CACHE), "layers", ())):
            options["attention_mask"] = None
        return forward(self, input_ids=input_ids, **options)

    forgets.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(type(model), "forward", forgets)
    with torch.inference_mode():
        assert token_bytes(model, prompts) is None
    assert generate(model, prompts, [6] * 12, ends=[END], batch_tokens=64)[0] == plain
