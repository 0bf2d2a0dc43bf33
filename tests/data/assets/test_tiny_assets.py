"""The generated model and tasks: the same everywhere, consistent, and learnable."""

import json

import pytest
import torch

from fedproxy.data.assets import fetch
from fedproxy.data.assets.tiny_tasks import TASKS, sentences, task_rows

SIZES = {"train": 400, "validation": 100, "test": 200}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads that wait for each other cost such small matrices more than they save, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDPROXY_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield {name: fetch(name, progress=False) for name in ("tiny-llama", "tiny-qa", "tiny-calibration")}


@pytest.fixture(scope="module")
def tiny(cache):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = cache["tiny-llama"]
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_files_hold_the_declared_rows(cache):
    for name in TASKS:
        for split, size in SIZES.items():
            lines = (cache["tiny-qa"] / name / f"{split}.jsonl").read_text().splitlines()
            assert [json.loads(line) for line in lines] == task_rows(name, 42)[split]
            assert len(lines) == size
    assert len(cache["tiny-calibration"].read_text().splitlines()) == 200


@pytest.mark.parametrize("name", list(TASKS))
def test_no_question_is_asked_twice_and_every_gold_is_right(name):
    splits = task_rows(name, 42)
    rows = [row for split in splits.values() for row in split]
    assert len({row["query"] for row in rows}) == sum(SIZES.values())
    facts = TASKS[name].facts
    for row in rows:
        assert len(set(row["choices"])) == 4
        asked = [item for item in facts if f" {item} " in f" {row['query'].replace('?', ' ').replace(chr(10), ' ')} "]
        longest = max(asked, key=len)  # an item may be a word of another question, but never a longer one
        assert row["choices"][row["gold"]] == facts[longest]
    # gold positions are shuffled: each of the four is held by a quarter of 700, give or take 5 standard deviations (57)
    for position in range(4):
        assert abs(sum(row["gold"] == position for row in rows) - 175) < 57
    # every fact can be learnt before it is asked for
    assert {row["choices"][row["gold"]] for row in splits["test"]} <= {
        row["choices"][row["gold"]] for row in splits["train"]
    }


def test_seeds_decide():
    assert task_rows("tiny_sums", 1) == task_rows("tiny_sums", 1) != task_rows("tiny_sums", 2)
    assert sentences(3, 1) == sentences(3, 1) != sentences(3, 2)


def test_calibration_text_holds_no_clients_question(cache):
    text = cache["tiny-calibration"].read_text()
    assert "?" not in text
    assert "Question" not in text
    assert "Answer" not in text


def test_the_model_is_made_from_its_seed_and_leaves_the_callers_alone(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDPROXY_CACHE", str(tmp_path))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    again = fetch("tiny-llama", progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    for file in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (again / file).read_bytes() == (cache["tiny-llama"] / file).read_bytes()


def test_the_tokenizer_round_trips_and_knows_every_word(cache, tiny):
    model, tokenizer = tiny
    assert len(tokenizer) == model.config.vocab_size == 512
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, None}) == 4
    texts = [
        f"{row['query']} {choice}"
        for name in TASKS
        for row in task_rows(name, 42)["test"][:50]
        for choice in row["choices"]
    ]
    for text in [*texts, "naïve — 你好"]:  # byte level: nothing is unknown
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert max(len(tokenizer(text).input_ids) for text in texts) <= 64
    prompt, whole = tokenizer("Answer:").input_ids, tokenizer("Answer: blue").input_ids
    assert whole[: len(prompt)] == prompt  # a prompt's tokens do not depend on the answer that follows


def test_blocks_differ_in_influence(cache, tiny):
    model, tokenizer = tiny
    texts = [json.loads(line)["text"] for line in cache["tiny-calibration"].read_text().splitlines()[:16]]
    influence = torch.zeros(6)

    def note(index):
        def hook(_, inputs, output):
            influence[index] += (1 - torch.cosine_similarity(inputs[0], output, dim=-1)).mean() / len(texts)

        return hook

    hooks = [block.register_forward_hook(note(i)) for i, block in enumerate(model.model.layers)]
    with torch.inference_mode():
        for text in texts:
            model(torch.tensor([tokenizer(text).input_ids]))
    for hook in hooks:
        hook.remove()
    assert influence.topk(3).indices.sort().values.tolist() == [0, 1, 5]  # the blocks with the largest gains
    assert influence.max() > 10 * influence.min()


def test_a_few_dozen_steps_lift_a_task_far_above_chance(cache):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(cache["tiny-llama"])
    tokenizer = AutoTokenizer.from_pretrained(cache["tiny-llama"])
    rows = task_rows("tiny_places", 42)

    def logits_at_answer(batch):
        ids = [tokenizer(row["query"]).input_ids for row in batch]
        width = max(map(len, ids))
        padded = torch.tensor([row + [0] * (width - len(row)) for row in ids])
        out = model(padded, attention_mask=(torch.arange(width) < torch.tensor([[len(row)] for row in ids])).long())
        return out.logits[torch.arange(len(ids)), torch.tensor([len(row) - 1 for row in ids])]

    def first_token(answer):
        return tokenizer(" " + answer).input_ids[0]

    def accuracy():
        with torch.inference_mode():
            scores = logits_at_answer(rows["test"])
        picks = [
            s[[first_token(c) for c in row["choices"]]].argmax().item()
            for s, row in zip(scores, rows["test"], strict=True)
        ]
        return sum(pick == row["gold"] for pick, row in zip(picks, rows["test"], strict=True)) / len(picks)

    assert accuracy() < 0.4  # chance is 0.25 and 200 questions have a standard error of 0.03
    optimizer = torch.optim.AdamW(model.model.layers.parameters(), lr=3e-3)
    for step in range(36):
        batch = rows["train"][step % 12 * 32 : step % 12 * 32 + 32]
        wanted = torch.tensor([first_token(row["choices"][row["gold"]]) for row in batch])
        torch.nn.functional.cross_entropy(logits_at_answer(batch), wanted).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert accuracy() > 0.6
