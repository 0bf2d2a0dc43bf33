import math

import pytest
import torch

from fedproxy.data.rows import Row
from fedproxy.data.templates import chat_template
from fedproxy.data.tokenisation import tokenise
from fedproxy.errors import ConfigError
from fedproxy.evaluation import own_data
from fedproxy.evaluation.evaluators import Evaluator
from fedproxy.evaluation.evaluators.base import Asked
from fedproxy.evaluation.evaluators.own_data import OwnData
from fedproxy.evaluation.generation import generate
from fedproxy.evaluation.own_data import own_data_notes, rows_sha256, score_rows

ROWS = [
    Row("Question: Which of these is red? Answer:", " a ripe tomato", "ward", "ward/test/0", ends=True),
    Row("Where would you put a cup? ", "on the table", "ward", "ward/test/1", ends=True),
    Row("The sky is", " blue", "ward", "ward/test/2", ends=True),
]
TALE = " the sky is blue in the morning and grass is green and snow is white"
LONG = [Row("Say it:", TALE, "tale", "tale/test/0")]


def plain_nlls(model, tokenizer, rows):
    """One forward per row, and a loop over its answer."""
    found = []
    for example in tokenise(rows, tokenizer, max_input_tokens=999, max_target_tokens=999):
        ids = torch.tensor([example.input_ids])
        with torch.no_grad():
            logs = model(ids).logits[0].double().log_softmax(-1)
        start = len(example.input_ids) - example.target_length
        nll = -sum(float(logs[place - 1, ids[0, place]]) for place in range(start, ids.shape[1]))
        found.append((nll, example.target_length))
    return found


def test_likelihoods_are_a_plain_loops(model, tokenizer):
    result = score_rows(model, tokenizer, {"ward": ROWS}, OwnData(max_new_tokens=0))
    plain = plain_nlls(model, tokenizer, ROWS)
    for sample, (nll, tokens) in zip(result.samples, plain, strict=True):
        assert sample["answer_nll"] == pytest.approx(nll / tokens, rel=1e-5)
        assert sample["answer_tokens"] == tokens
    ratio = sum(nll for nll, _ in plain) / sum(tokens for _, tokens in plain)
    scores = result.scores["ward"]
    assert scores["answer_nll"] == pytest.approx(ratio, rel=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(ratio), rel=1e-4)
    # of a ratio: residues nll - ratio * tokens, over the mean number of tokens
    residues = torch.tensor([nll - ratio * tokens for nll, tokens in plain])
    mean = sum(tokens for _, tokens in plain) / 3
    assert scores["answer_nll_stderr"] == pytest.approx(float((residues**2).sum().div(2 * 3).sqrt()) / mean, rel=1e-3)
    assert scores["n"] == 3
    assert "exact_match" not in scores


def test_short_answers_are_matched_and_long_ones_compared(model, tokenizer):
    result = score_rows(model, tokenizer, {"ward": ROWS, "tale": LONG}, OwnData(max_new_tokens=4))
    assert {"exact_match", "f1", "exact_match_stderr"} <= result.scores["ward"].keys()
    assert "rouge_l" in result.scores["tale"]
    assert "rouge_l" not in result.scores["ward"]
    assert set(result.mean) == {"answer_nll", "perplexity", "n"}  # what both sources have
    assert [sample["task"] for sample in result.samples] == ["ward"] * 3 + ["tale"]
    forced = score_rows(model, tokenizer, {"tale": LONG}, OwnData("short", max_new_tokens=4))
    assert {"exact_match", "f1"} <= forced.scores["tale"].keys()


CHAT = Row(
    "user: The sky is", "blue", "ward", "ward/test/3",
    messages=({"role": "user", "content": "The sky is"}, {"role": "assistant", "content": "blue"}),
)  # fmt: skip


@pytest.mark.parametrize(("row", "template"), [(ROWS[2], "auto"), (CHAT, "chatml"), (CHAT, "none")])
def test_a_model_that_knows_the_answers_gets_them_all(tokenizer, model, monkeypatch, row, template):
    """Trained to repeat one answer, it generates it: exact match is 1, and the end token ends it."""
    assert "<|im_end|>" not in tokenizer.get_vocab()
    monkeypatch.setattr(tokenizer, "chat_template", chat_template(template, tokenizer))
    (example,) = tokenise([row], tokenizer, max_input_tokens=99, max_target_tokens=99)
    ids = torch.tensor([example.input_ids])
    labels = torch.full_like(ids, -100)
    for start, end in example.spans:
        labels[:, start:end] = ids[:, start:end]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        model(ids, labels=labels).loss.backward()
        optimizer.step()
    told = []
    settings = OwnData(max_new_tokens=12)
    monkeypatch.setattr(own_data, "generate", lambda *args, **kw: told.append(generate(*args, **kw)) or told[0])
    scores = score_rows(model, tokenizer, {"ward": [row]}, settings).scores["ward"]
    assert scores["exact_match"] == scores["f1"] == 1.0
    assert scores["answer_nll"] < 0.1
    assert len(told[0][0][0]) < 12  # it stopped by itself


def test_stop_texts_end_an_answer(model, tokenizer, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "decode", lambda *_, **__: " blue\nQuestion: what")
    settings = OwnData(stop=["\n", "what"])
    assert score_rows(model, tokenizer, {"ward": [ROWS[2]]}, settings).scores["ward"]["exact_match"] == 1.0


def test_the_first_rows_of_each_source_are_asked(model, tokenizer):
    result = score_rows(model, tokenizer, {"ward": ROWS}, OwnData(max_new_tokens=0, limit=2))
    assert result.scores["ward"]["n"] == 2


def test_what_has_no_room_is_told(model, tokenizer):
    long = [Row("word " * 300, " blue", "ward", "ward/test/0")]
    (note,) = own_data_notes({"ward": long}, OwnData(), model.config, tokenizer)
    assert "ward: of 1 held-out rows 1 lose the beginning of their prompt and 0 the end of their answer" in note
    result = score_rows(model, tokenizer, {"ward": long}, OwnData(max_new_tokens=40))
    assert result.notes == [note]
    assert own_data_notes({"ward": ROWS}, OwnData(), model.config, tokenizer) == []
    assert own_data_notes({"ward": ROWS}, OwnData(max_prompt_tokens=2), model.config, tokenizer)


def talk(*said):
    roles = ("user", "assistant")
    turns = tuple({"role": roles[place % 2], "content": text} for place, text in enumerate(said))
    return Row("\n".join(said[:-1]), said[-1], "ward", "ward/test/0", messages=turns)


def test_the_longest_prompt_of_a_conversation_is_the_options(model, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", chat_template("none", tokenizer))
    rows, read = [talk("grass is green", "snow", "The sky is", "blue")], []
    monkeypatch.setattr(own_data, "generate", lambda _, prompts, *__, **___: (read.extend(prompts), ([[]], True))[1])
    short = score_rows(model, tokenizer, {"ward": rows}, OwnData(max_prompt_tokens=5))
    whole = score_rows(model, tokenizer, {"ward": rows}, OwnData())
    assert len(read[0]) == 5 < len(read[1])
    assert read[0] == read[1][-5:]
    assert short.samples[0]["answer_tokens"] == whole.samples[0]["answer_tokens"]
    assert "ward: of 1 held-out rows 1 lose the beginning of their prompt" in short.notes[0]


def test_another_template_asks_another_prompt(model, tokenizer, monkeypatch):
    rows, found = [talk("The sky is", "blue")], []
    for choice in ("none", "chatml", "none"):
        monkeypatch.setattr(tokenizer, "chat_template", chat_template(choice, tokenizer))
        [sample] = score_rows(model, tokenizer, {"ward": rows}, OwnData(max_new_tokens=0)).samples
        found.append(sample)
    assert len({sample["doc_hash"] for sample in found}) == 1
    assert found[0]["prompt_hash"] == found[2]["prompt_hash"] != found[1]["prompt_hash"]


def test_the_model_is_left_as_it_was(model, tokenizer):
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.train()
    score_rows(model, tokenizer, {"ward": ROWS}, OwnData(max_new_tokens=2))
    assert model.training
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_progress_reaches_its_end(model, tokenizer):
    told = []
    settings = OwnData(max_new_tokens=2)
    score_rows(model, tokenizer, {"ward": ROWS}, settings, progress=lambda *now: told.append(now))
    assert told[-1] == (6, 6)


def test_rows_are_told_from_others():
    assert rows_sha256(ROWS) == rows_sha256(list(ROWS))
    assert rows_sha256(ROWS) != rows_sha256(ROWS[::-1])
    evaluator = Evaluator.by_name("own_data")()
    asked = Asked(rows={"ward": ROWS})
    assert evaluator.fingerprint(asked) == {"ward": rows_sha256(ROWS)}
    assert evaluator.sources(asked) == ["ward"]
    assert evaluator.sources(Asked(tasks=["arc_easy"])) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": -1}, "evaluation.evaluators.own_data.max_new_tokens must be at least 0, got -1"),
        ({"limit": 0}, "evaluation.evaluators.own_data.limit must be at least 1, or null, got 0"),
        ({"stop": [""]}, "evaluation.evaluators.own_data.stop must be a list of texts, none of them empty"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ConfigError, match=message):
        Evaluator.by_name("own_data")(**options)
