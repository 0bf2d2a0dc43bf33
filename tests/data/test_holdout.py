from dataclasses import replace

import pytest

from fedproxy.data.formats.chat import Chat
from fedproxy.data.holdout import hold_out
from fedproxy.data.records import Columns, Record
from fedproxy.data.rows import Row


def talk(number, *said, loss="all"):
    roles = ("user", "assistant")
    turns = [{"role": roles[place % 2], "content": text} for place, text in enumerate(said)]
    record = Record(f"row {number}", {"messages": turns})
    return Chat(loss=loss).row(record, Columns(), source="ward", key=f"ward/train/{number}")


def split(rows, count, seed):
    kept, notes = hold_out(rows, count, seed)
    return [row for row in kept if not row.held_out], [row for row in kept if row.held_out], notes


def pairs(loss):
    """Ten first questions with their answers, alone and as the beginning of a longer conversation."""
    long = [talk(k, f"q{k}", f"a{k}", f"and {k}", f"b{k}", loss=loss) for k in range(10)]
    return [*long, *(talk(k + 10, f"q{k}", f"a{k}", loss=loss) for k in range(10))]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_no_answer_inside_of_a_conversation_that_is_trained_on_is_held_out(seed):
    rows = pairs("all")
    trained, held, notes = split(rows, 10, seed)
    told = {tuple(turn["content"] for turn in row.messages[:2]) for row in trained}
    alone = [row for row in held if len(row.messages) == 2]
    assert alone  # some are left
    assert not [row for row in alone if tuple(turn["content"] for turn in row.messages) in told]
    assert len(trained) == 10
    assert notes[1] == f"{10 - len(held)} further held-out rows were dropped: training rows have the same prompts."


def test_an_answer_without_loss_teaches_nothing():
    trained, held, notes = split(pairs("last"), 10, 0)
    assert (len(trained), len(held), len(notes)) == (10, 10, 1)


def test_prompts_and_texts_are_compared_whole():
    rows = [Row(f"p{k % 5}", f" t{k}", "ward", f"ward/train/{k}") for k in range(10)]
    rows += [Row("", f"text {k % 5}", "notes", f"notes/train/{k}", loss="all") for k in range(10)]
    trained, held, _ = split(rows, 5, 1)
    assert {row.prompt or row.target for row in trained}.isdisjoint(row.prompt or row.target for row in held)
    assert [replace(row, held_out=False) for row in held] == [row for row in rows if row.key in {h.key for h in held}]
