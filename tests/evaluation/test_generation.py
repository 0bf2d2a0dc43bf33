import pytest
import torch

from fedproxy.evaluation.generation import generate
from fedproxy.models import Decoder
from fedproxy.models.logit_offset import LogitOffsetModel

END = 2


def one_by_one(model, prompts, limits):
    """Transformers' own greedy search, prompt by prompt."""
    found = []
    for prompt, limit in zip(prompts, limits, strict=True):
        ids = torch.tensor([prompt])
        whole = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=limit, eos_token_id=END,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()  # fmt: skip
        found.append(whole[: whole.index(END)] if END in whole else whole)
    return found


def random_prompts(count=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 20, (count,), generator=generator).tolist()
    return [torch.randint(3, 61, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt"])
def test_batches_give_the_tokens_of_single_prompts(make_model, family):
    model, prompts = make_model(family), random_prompts()
    limits = [8 if index % 3 else 5 for index in range(len(prompts))]
    found, together = generate(model, prompts, limits, ends=[END], batch_tokens=100)
    assert together
    assert found == one_by_one(model, prompts, limits)
    assert len({len(answer) for answer in found}) > 1 or all(found)


def test_an_answer_stops_at_any_end_token(make_model):
    model, prompt = make_model("llama"), [5, 6, 7]
    (long,), _ = generate(model, [prompt], [8], ends=[], batch_tokens=64)
    assert len(long) == 8
    last = long[3]
    (short,), _ = generate(model, [prompt], [8], ends=[60, last], batch_tokens=64)
    assert short == long[: long.index(last)]


def test_a_models_own_settings_are_set_aside_and_come_back(make_model):
    model, prompts = make_model("llama"), random_prompts(4)
    plain = one_by_one(model, prompts, [6] * 4)
    model.generation_config.update(repetition_penalty=9.0, do_sample=True, temperature=5.0, num_beams=3)
    kept = model.generation_config
    model.train()
    found, _ = generate(model, prompts, [6] * 4, ends=[END], batch_tokens=64)
    assert found == plain
    assert model.generation_config is kept
    assert model.training


def test_a_model_that_reads_padding_gets_its_prompts_one_by_one(make_model):
    model, prompts = make_model("llama"), random_prompts()
    plain = one_by_one(model, prompts, [5] * len(prompts))
    seen, forward = [], model.forward

    def blind(input_ids=None, attention_mask=None, position_ids=None, **rest):
        """Attend to everything, as layers without a mask do."""
        seen.append(len(input_ids))
        return forward(input_ids=input_ids, **rest)

    model.forward = blind
    found, together = generate(model, prompts, [5] * len(prompts), ends=[END], batch_tokens=1000)
    assert not together
    assert max(seen[2:]) == 1
    assert found == plain


def test_progress_counts_prompts(make_model):
    told = []
    generate(make_model("llama"), random_prompts(5), [2] * 5, ends=[], batch_tokens=40, progress=told.append)
    assert told[-1] == 5
    assert told == sorted(told)


def test_three_models_whose_logits_are_added_generate_in_batches(make_model):
    target = make_model("llama", layers=4)
    untuned, tuned = Decoder.of(target).subset((0, 3)), Decoder.of(target).subset((0, 3))
    with torch.no_grad():
        for parameter in Decoder.of(tuned).blocks.parameters():
            parameter.mul_(1.1)
    model, prompts = LogitOffsetModel(target, tuned, untuned), random_prompts(8)
    found, together = generate(model, prompts, [5] * 8, ends=[END], batch_tokens=200)
    assert together
    assert found == one_by_one(model, prompts, [5] * 8)
