"""Held-out questions: nobody's rows, scored as lm-eval scores them, checked by a plain loop."""

import math

import numpy as np
import pytest
import torch

from fedproxy.data.rows import Row
from fedproxy.errors import DataError
from fedproxy.evaluation.task_rows import render_rows
from fedproxy.evaluation.validation import row_questions, score_questions, task_questions

from .conftest import ARC, write_rows
from .plain_loop import plain_scores


@pytest.fixture
def cache(cache):
    """The shared cache, whose train rows are all scored too; here the scored ones are others."""
    other = {"id": "9", "question": "What is late?", "choices": {"text": ["snow", "the cup"], "label": ["A", "B"]}}
    write_rows(cache / "qa/arc_easy/test.jsonl", [{**other, "answerKey": "B"}])
    sentence = "The sky was blue because the _ was red."
    blank = {"sentence": sentence, "option1": "cup", "option2": "bed", "answer": "1"}
    write_rows(cache / "qa/winogrande/validation.jsonl", [blank])
    return cache


def test_questions_are_rows_that_nobody_owns(cache):
    rows = render_rows("arc_easy")  # ARC backwards, six rows
    owned = [rows[0], rows[3]]
    found = task_questions("arc_easy", 4, owned, seed=1)
    assert {question.key for question in found} == {row.key for row in rows} - {row.key for row in owned}
    assert all(question.requests[question.gold] in [(row.prompt, row.target) for row in rows] for question in found)
    assert [q.key for q in task_questions("arc_easy", 4, owned, seed=1)] == [q.key for q in found]
    assert [q.key for q in task_questions("arc_easy", 4, owned, seed=2)] != [q.key for q in found]


def test_a_row_with_an_owned_text_is_owned_whatever_its_key(cache):
    row = render_rows("arc_easy")[2]
    twin = Row(row.prompt, row.target, "elsewhere", "elsewhere/train/7")
    assert row.key not in {question.key for question in task_questions("arc_easy", 5, [twin], seed=1)}


def test_a_question_of_the_scored_split_is_not_asked(cache):
    question, texts, gold = ARC[2]
    row = {
        "id": "2",
        "question": question,
        "choices": {"text": texts, "label": list("ABCD")},
        "answerKey": "ABCD"[gold],
    }
    write_rows(cache / "qa/arc_easy/test.jsonl", [row])
    found = task_questions("arc_easy", 5, [], seed=1)
    assert all(question not in context for asked in found for context, _ in asked.requests)
    with pytest.raises(DataError, match="clients leave 5 training rows of 'arc_easy' without an owner"):
        task_questions("arc_easy", 6, [], seed=1)


def test_too_few_rows_without_an_owner_are_told_in_one_line(cache):
    owned = render_rows("arc_easy", limit=4)
    message = (
        r"^federation.validation.rows is 3, but clients leave 2 training rows of 'arc_easy' without an owner; "
        r"lower it, or lower data.rows_per_task$"
    )
    with pytest.raises(DataError, match=message):
        task_questions("arc_easy", 3, owned, seed=1)
    with pytest.raises(DataError, match=r"is 2, but clients leave 1 training rows of 'ward' without an owner"):
        row_questions("ward", owned[:2], 2, owned[:1], seed=1)


def test_scores_equal_a_plain_loop(cache, model, tokenizer):
    questions = task_questions("arc_easy", 5, [], seed=3)
    train = ARC[::-1]
    triples = []
    for question in questions:
        text, answers, gold = train[int(question.key.rsplit("/", 1)[1])]
        triples.append((f"Question: {text}\nAnswer:", answers, gold))
    plain = plain_scores(model, tokenizer, triples)
    found = score_questions(model, tokenizer, questions)
    assert set(found) == {"arc_easy", "mean"}
    for metric, column in (("acc", 1), ("acc_norm", 2)):
        right = [float(question[column]) for question in plain]
        assert found["arc_easy"][metric] == pytest.approx(np.mean(right))
        assert found["arc_easy"][f"{metric}_stderr"] == pytest.approx(np.std(right, ddof=1) / math.sqrt(5))
    nll = -sum(values[gold] for (values, *_), (_, _, gold) in zip(plain, triples, strict=True))
    assert found["arc_easy"]["answer_nll"] == pytest.approx(nll / sum(question[3] for question in plain), rel=1e-5)
    assert found["mean"] == found["arc_easy"]
    assert found["mean"]["n"] == 5


def test_a_source_without_choices_has_a_loss_alone_and_the_mean_what_all_have(cache, model, tokenizer):
    rows = [Row(f"The {thing} is", " red.", "ward", f"ward/train/{i}") for i, thing in enumerate(("sky", "cup", "bed"))]
    questions = [*row_questions("ward", rows, 2, rows[:1], seed=1), *task_questions("winogrande", 2, [], seed=1)]
    assert {question.key for question in questions[:2]} == {"ward/train/1", "ward/train/2"}
    found = score_questions(model, tokenizer, questions)
    assert set(found["ward"]) == {"answer_nll", "n"}
    assert set(found["winogrande"]) == {"acc", "acc_stderr", "answer_nll", "n"}
    assert set(found["mean"]) == {"answer_nll", "n"}
    assert found["mean"]["answer_nll"] == pytest.approx(
        (found["ward"]["answer_nll"] + found["winogrande"]["answer_nll"]) / 2
    )


def test_the_model_and_the_random_generators_stay_as_they_were(cache, model, tokenizer):
    model.train()
    before = {name: weights.clone() for name, weights in model.state_dict().items()}
    torch.manual_seed(7)
    state = torch.get_rng_state()
    score_questions(model, tokenizer, task_questions("arc_easy", 2, [], seed=1))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(weights, before[name]) for name, weights in model.state_dict().items())
