"""What records say in each format, and every kind of row that is refused: file, line, rule and way out."""

import csv
import gzip
import json

import pytest

from fedproxy.config import load_config
from fedproxy.data.formats import DataFormat
from fedproxy.data.readers import kind_of
from fedproxy.data.records import Columns
from fedproxy.data.sources import owners_in, read_rows, read_source
from fedproxy.errors import ConfigError, DataError

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}


def write(path, *records):
    lines = (record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def read(path, form, **options):
    return read_rows("mine", str(path), form=DataFormat.by_name(form)(**options))


def test_a_conversation_has_its_last_answer_as_target_and_the_rest_as_prompt(tmp_path):
    turns = [{"role": "system", "content": "Be kind."}, USER, ANSWER, USER, {**ANSWER, "content": "again"}]
    path = write(tmp_path / "d.jsonl", {"messages": [*turns, {"role": "user", "content": "bye"}]})
    (row,) = read(path, "chat")
    assert (row.prompt, row.target, row.loss) == ("Be kind.\nhi\nho\nhi", "again", "all")
    assert list(row.messages) == turns
    assert read(path, "chat", loss="last")[0].loss == "target"


def test_sharegpt_roles_and_names_of_ones_own(tmp_path):
    said = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}, {"from": "observation", "value": "42"}]
    path = write(tmp_path / "d.jsonl", {"conversations": [*said, {"from": "gpt", "value": "so"}], "system": "Be kind."})
    assert [turn["role"] for turn in read(path, "chat")[0].messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    path = write(
        tmp_path / "e.jsonl", {"visit": [{"role": "patient", "content": "ow"}, {"role": "doctor", "content": "oh"}]}
    )
    roles = {"patient": "user", "doctor": "assistant"}
    assert [turn["role"] for turn in read(path, "chat", column="visit", roles=roles)[0].messages] == [
        "user",
        "assistant",
    ]
    with pytest.raises(ConfigError, match=r"data.format.roles must be names of system, user, assistant, tool, got"):
        DataFormat.by_name("chat")(roles={"patient": "human"})


def test_text_parts_of_a_turn_are_its_lines(tmp_path):
    parts = [{"type": "text", "text": "hi"}, {"type": "text", "text": "you", "image_url": None}]
    path = write(tmp_path / "d.jsonl", {"messages": [{**USER, "content": parts}, ANSWER]})
    assert list(read(path, "chat")[0].messages) == [{**USER, "content": "hi\nyou"}, ANSWER]


def test_tool_calls_and_tools_are_kept_as_they_are(tmp_path):
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": None}}}
    turns = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]
    turns += [{"role": "tool", "content": "3", "tool_call_id": "1", "name": "add"}, ANSWER]
    tool = {"type": "function", "function": {"name": "add", "parameters": {"default": None}}}
    for tools in ([tool], json.dumps([tool])):
        (row,) = read(write(tmp_path / "d.jsonl", {"messages": turns, "tools": tools}), "chat")
        assert row.tools == (tool,)
        assert row.messages[1] == {"role": "assistant", "content": "", "tool_calls": [call]}
        assert row.messages[2] == turns[2]
    (row,) = read(write(tmp_path / "e.jsonl", {"messages": turns[:2]}), "chat")
    assert json.loads(row.target) == [call]


@pytest.mark.parametrize("flat", [False, True])
def test_arguments_of_a_call_are_objects_also_where_they_come_as_text(tmp_path, flat):
    kept = {"a": {"a": 1, "unit": "mg"}, "b": "", "c": "[1]", "d": '{"a": 1, "a": 2}', "e": None}
    sent = {**kept, "a": '{"a": 1, "unit": "mg"}'}

    def calls(arguments):
        named = [{"name": name, "arguments": value} for name, value in arguments.items()]
        return named if flat else [{"function": one} for one in named]

    turn = {"role": "assistant", "content": None}
    path = write(tmp_path / "d.jsonl", {"messages": [USER, {**turn, "tool_calls": calls(sent)}]})
    assert read(path, "chat")[0].messages[1]["tool_calls"] == calls(kept)


def test_alpaca_rows_and_renamed_columns(tmp_path):
    records = [{"instruction": "Say.", "input": about, "output": "It."} for about in ("", None, " ", "this\nthing")]
    rows = read(write(tmp_path / "d.jsonl", *records, {"instruction": "Say.", "output": "It."}), "instruction")
    assert [row.prompt for row in rows] == ["Say.", "Say.", "Say.", "Say.\n\nthis\nthing", "Say."]
    assert {row.target for row in rows} == {"It."}
    path = write(tmp_path / "e.jsonl", {"question": "Q?", "notes": "N", "reply": "R", "role": "S"})
    (row,) = read(path, "instruction", instruction="question", input="notes", output="reply", system="role")
    assert [turn["content"] for turn in row.messages] == ["S", "Q?\n\nN", "R"]
    (row,) = read(write(tmp_path / "f.jsonl", {"note": "words"}), "text", column="note")
    assert (row.prompt, row.target, row.loss, row.is_text) == ("", "words", "all", True)


@pytest.mark.parametrize(
    ("record", "form"),
    [
        ({"messages": [USER, ANSWER], "text": "x"}, "chat"),
        ({"conversations": [USER, ANSWER]}, "chat"),
        ({"instruction": "a", "output": "b", "prompt": "c", "target": "d"}, "instruction"),
        ({"prompt": "a", "target": "b", "text": "c"}, "prompt_target"),
        ({"text": "a", "tools": "hammer"}, "text"),
    ],
)
def test_auto_takes_what_the_first_record_shows(tmp_path, record, form):
    source = read_source("mine", write(tmp_path / "d.jsonl", record, record), form=DataFormat.by_name("auto")())
    assert (source.form, len(source.rows)) == (form, 2)


def test_auto_takes_renamed_columns_of_prompts_and_says_when_it_knows_none(tmp_path):
    path, auto = write(tmp_path / "d.jsonl", {"q": "a", "a": "b"}), DataFormat.by_name("auto")()
    assert read_source("mine", path, form=auto, columns=Columns("q", "a")).form == "prompt_target"
    with pytest.raises(
        DataError, match=r"d.jsonl line 1: data.format.name=auto knows none of its columns \(q, a\); name"
    ):
        read_source("mine", path, form=auto)


TURNS = "d.jsonl line 2: 'messages'"


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"messages": "hi"}, rf"{TURNS} is not a JSON list \(it is not valid JSON .*\); correct it or remove the row"),
        ({"messages": []}, rf"{TURNS} must be a list of turns, got \[\]; correct it or remove the row"),
        ({"messages": 3}, rf"{TURNS} must be a list of turns, got 3; correct it or remove the row"),
        (
            {"messages": None},
            r"d.jsonl line 2 has no column 'messages'$",
        ),
        ({"prompt": "a"}, r"d.jsonl line 2 has no column 'messages'; known: prompt"),
        (
            {"messages": ["hi"]},
            rf"{TURNS} turn 1 must have a role and a content, got 'hi'; correct it or remove the row",
        ),
        (
            {"messages": [{"content": "a"}]},
            rf"{TURNS} turn 1 has neither 'role' nor 'from' \(it has: content\); name who",
        ),
        (
            {"messages": [{**USER, "role": "usr"}]},
            rf"{TURNS} turn 1: unknown role 'usr'; did you mean 'user'\?; or give",
        ),
        ({"messages": [{**USER, "role": 4}]}, rf"{TURNS} turn 1: unknown role 4; .*data.format.roles"),
        (
            {"messages": [{**USER, "content": 4}, ANSWER]},
            rf"{TURNS} turn 1: 'content' must be text, got int 4; put it into",
        ),
        (
            {"messages": [{**USER, "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, ANSWER]},
            rf"{TURNS} turn 1: 'content' has a part that is no text \(.*\); only text is trained on: remove the row",
        ),
        (
            {"messages": [{**USER, "content": [{"type": "text"}]}, ANSWER]},
            rf"{TURNS} turn 1: 'content' part 1 must be text, got NoneType None; put it into",
        ),
        ({"messages": [USER, {**ANSWER, "content": []}]}, rf"{TURNS} turn 2: the answer's 'content' is empty; fill"),
        ({"messages": [{"role": "user"}, ANSWER]}, rf"{TURNS} turn 1 has no 'content'; fill it in or remove the row"),
        ({"messages": [{"role": "user", "content": None}]}, rf"{TURNS} turn 1 has no 'content'; fill it in"),
        ({"messages": [{"from": "human", "content": "a"}]}, rf"{TURNS} turn 1 has no 'value'; fill it in or remove"),
        (
            {"messages": [USER, {**ANSWER, "content": " "}]},
            rf"{TURNS} turn 2: the answer's 'content' is empty; fill it in",
        ),
        ({"messages": [USER, {**ANSWER, "content": "\ud800"}]}, rf"{TURNS} turn 2: 'content' holds half a character"),
        ({"messages": [USER]}, r"d.jsonl line 2: no turn is the assistant's; add an answer or remove the row"),
        (
            {"messages": [ANSWER, USER]},
            r"d.jsonl line 2: the first turn is the assistant's; put what it answers before",
        ),
        ({"messages": [USER] * 1025}, rf"{TURNS} has 1025 turns, 1024 are the most; break it into several rows"),
        (
            {"messages": [USER, {**ANSWER, "tool_calls": ["x"]}]},
            rf"{TURNS} turn 2: 'tool_calls' must be a list of objects, got \['x'\]; correct it",
        ),
        ({"messages": [USER, ANSWER], "tools": "{}"}, r"line 2: 'tools' is not a JSON list \(it must hold a list"),
        ({"messages": [USER, ANSWER], "tools": 3}, r"line 2: 'tools' must be a list of objects, got 3; correct it"),
        ({"messages": [USER, ANSWER], "system": 3}, r"line 2: 'system' must be text, got int 3; put it into quotes"),
        (
            '{"messages": [{"role": "user", "role": "tool"}]}',
            r"'role' stands twice in one object\); write one",
        ),
        ("{", r"d.jsonl line 2: it is not valid JSON .*; write one JSON object in each line"),
        ("[]", r"d.jsonl line 2: it must hold an object, got list; write one JSON object in each line"),
    ],
)
def test_broken_conversations_are_refused(tmp_path, broken, message):
    if isinstance(broken, dict):
        broken = json.dumps(broken)
    path = write(tmp_path / "d.jsonl", {"messages": [USER, ANSWER]}, broken)
    with pytest.raises(DataError, match=message) as error:
        read(path, "chat")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("form", "broken", "message"),
    [
        ("instruction", {"instruction": "a"}, r"d.jsonl line 2 has no column 'output'; known: instruction"),
        ("instruction", {"instruction": "a", "output": None}, r"line 2: 'output' must be text, got NoneType None"),
        (
            "instruction",
            {"instruction": " ", "output": "b"},
            r"line 2: 'instruction' is empty; fill it in or remove the",
        ),
        (
            "instruction",
            {"instruction": "a", "output": 42},
            r"line 2: 'output' must be text, got int 42; put it into quo",
        ),
        ("instruction", {"instruction": "a", "output": "b", "input": ["c"]}, r"line 2: 'input' must be text, got list"),
        ("text", {"txt": "a"}, r"d.jsonl line 2 has no column 'text'; did you mean 'txt'\?"),
        ("text", {"text": ""}, r"line 2: 'text' is empty; fill it in or remove the row"),
        ("text", {"text": 1.5}, r"line 2: 'text' must be text, got float 1.5; put it into quotes or remove the row"),
        (
            "prompt_target",
            {"prompt": "a", "target": 4},
            r"line 2: 'target' must be text, got int 4; put it into quotes",
        ),
    ],
)
def test_broken_rows_of_the_other_formats_are_refused(tmp_path, form, broken, message):
    good = {"instruction": "a", "output": "b", "text": "c", "prompt": "d", "target": "e"}
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / "d.jsonl", good, broken), form)


MARKED = "one\u2028two\u2029three\x85four \ufeff five"
"""Text with what some programs take for line ends, and a byte order mark inside."""


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_byte_order_marks_line_ends_and_line_separators_are_read_right(tmp_path, suffix, newline):
    records = [{"text": MARKED}, {"text": f'a, "b"{newline}c'}]
    if suffix.startswith(".csv"):
        path = tmp_path / "plain.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator=newline).writerows([["text"], *([record["text"]] for record in records)])
        data = path.read_bytes()
    elif suffix.startswith(".jsonl"):
        data = newline.join(["", *(json.dumps(record, ensure_ascii=False) for record in records), ""]).encode()
    else:
        data = json.dumps(records, ensure_ascii=False, indent=1).replace("\n", newline).encode()
    data = b"\xef\xbb\xbf" + data
    path = tmp_path / f"d{suffix}"
    path.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    assert [row.target for row in read(path, "text")] == [record["text"] for record in records]
    assert kind_of(path) == suffix.removesuffix(".gz")


def test_packed_files_are_bounded_whole_and_name_their_lines(tmp_path, monkeypatch):
    path, data = tmp_path / "d.jsonl.gz", b'{"text": "a"}\n' * 1000
    path.write_bytes(gzip.compress(data)[:-20])
    with pytest.raises(DataError, match=r"d.jsonl.gz is not a whole gzip file \(.*\); pack it again"):
        read(path, "text")
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"d.jsonl.gz is not a whole gzip file \(Not a gzipped file.*\); pack it again"):
        read(path, "text")
    path.write_bytes(gzip.compress(data + b"{\n"))
    with pytest.raises(DataError, match=r"d.jsonl.gz line 1001: it is not valid JSON"):
        read(path, "text")
    monkeypatch.setattr("fedproxy.data.readers.MOST_UNPACKED", 5000)
    with pytest.raises(DataError, match=r"d.jsonl.gz unpacks to more than 5000 bytes; break it into several files"):
        read(path, "text")
    monkeypatch.setattr("fedproxy.data.readers.MOST_JSON_BYTES", 5000)
    (tmp_path / "d.json.gz").write_bytes(gzip.compress(b" " * 6000))
    monkeypatch.setattr("fedproxy.data.readers.MOST_UNPACKED", 1 << 20)
    with pytest.raises(DataError, match=r"d.json.gz unpacks to more than 5000 bytes; write an object a line"):
        read(tmp_path / "d.json.gz", "text")


def test_patterns_read_files_in_the_order_of_their_names(tmp_path):
    for name, said in (("w_2.jsonl", "b"), ("w_1.jsonl", "a"), ("w_3.jsonl", "c"), ("other.jsonl", "d")):
        write(tmp_path / name, {"text": said})
    rows = read(tmp_path / "w_*.jsonl", "text")
    assert [(row.target, row.key) for row in rows] == [(c, f"mine/train/{n}") for n, c in enumerate("abc")]
    assert len(read(tmp_path / "w_[12].jsonl", "text")) == 2
    with pytest.raises(DataError, match=r"v_\*.jsonl: no file or folder has such a name; correct the pattern"):
        read(tmp_path / "v_*.jsonl", "text")
    write(tmp_path / "odd[1].jsonl", {"text": "itself"})
    assert read(tmp_path / "odd[1].jsonl", "text")[0].target == "itself"


NESTED = {
    "messages": [
        [USER, ANSWER],
        [USER, {**ANSWER, "tool_calls": [{"function": {"name": "f", "arguments": {"a": "1"}}}]}],
    ],
    "tools": [None, [{"type": "function"}]],
    "picture": [{"bytes": b"no picture", "path": "/etc/passwd"}] * 2,
}


@pytest.mark.parametrize("form", ["chat", "auto"])
def test_nested_columns_of_tables_are_read_and_pictures_are_not(tmp_path, form):
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset

    pq.write_table(pa.table(NESTED), tmp_path / "d.parquet")
    Dataset.from_dict(NESTED).save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "d.parquet", tmp_path / "saved"):
        plain, called = read(path, form)
        # What other rows have and this one lacks stands as null in a table, and is no part of the row.
        assert list(plain.messages) == [USER, ANSWER]
        assert called.messages[1]["tool_calls"] == NESTED["messages"][1][1]["tool_calls"]
        assert (plain.tools, called.tools) == ((), ({"type": "function"},))


def test_tables_without_turns_or_with_other_things_in_their_place_are_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"prompt": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet has no column 'messages'; known: prompt"):
        read(tmp_path / "a.parquet", "chat")
    pq.write_table(pa.table({"messages": NESTED["picture"]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"column 'messages' must hold text or numbers, or lists and structs of them"):
        read(tmp_path / "b.parquet", "chat")
    pq.write_table(pa.table({"prompt": [["a"]], "target": ["b"]}), tmp_path / "c.parquet")
    with pytest.raises(DataError, match=r"column 'prompt' must hold text or numbers, got list"):
        read(tmp_path / "c.parquet", "prompt_target")


def test_chat_in_a_csv_file_is_json_text(tmp_path):
    with (tmp_path / "d.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["messages"], [json.dumps([USER, ANSWER])]])
    assert list(read(tmp_path / "d.csv", "chat")[0].messages) == [USER, ANSWER]


def test_a_column_names_owners(tmp_path):
    path = write(tmp_path / "d.jsonl", *({"text": "a", "site": site} for site in ("north", 7, "north")))
    rows = read_rows("mine", path, form=DataFormat.by_name("text")(), columns=Columns(owner="site"))
    assert [row.owner for row in rows] == ["north", "7", "north"]
    assert owners_in(path, "site") == {"north", "7"}
    with pytest.raises(DataError, match=r"d.jsonl line 1 has no column 'town'; known: site, text"):
        owners_in(path, "town")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("data.format.name=caht", r"^data.format.name: unknown data.format 'caht'; did you mean 'chat'\?$"),
        ("data.format={name: chat, losss: all}", r"^data.format.losss: unknown key"),
        ("data.format={name: chat, loss: none}", r"^data.format.loss must be one of all, last, got 'none'$"),
        ("data.formats={ward: chatt}", r"^data.formats.ward: unknown format 'chatt'; did you mean 'chat'\?$"),
        ("data.formats={word: chat}", r"^data.formats.word: data.files has no such source; did you mean 'ward'\?$"),
        ("data.weights={word: 2}", r"^data.weights.word: there is no such task or file; did you mean 'ward'\?$"),
        ("data.weights={ward: 0}", r"^data.weights.ward must be above 0 and at most 1000, got 0.0$"),
        ("data.weights={ward: .inf}", r"^data.weights must be finite, got inf"),
        ("data.weights=2", r"^data.weights must be a mapping of names to numbers like \{a: 0.5\}, got 2$"),
        ("data.holdout=0", r"^data.holdout must be a share above 0 and below 1, a whole number of at least 1, or null"),
        ("data.holdout=2.5", r"^data.holdout must be a share .*got 2.5$"),
        ("data.holdout=-1", r"^data.holdout must be a share .*got -1$"),
        ("data.long_rows=keep", r"^data.long_rows must be one of cut, split, drop, got 'keep'$"),
        ("data.template= ", r"^data.template must be auto, chatml, none or a file, got ' '$"),
    ],
)
def test_options_that_do_not_fit_are_refused(word, message):
    with pytest.raises(ConfigError, match=message):
        load_config(["recipe=fedproxy_tiny", "data.files={ward: ward.jsonl}", word])
