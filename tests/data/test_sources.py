"""Rows and texts from every kind of source; every broken input is one line that names file and row."""

import json
from pathlib import Path

import datasets
import pytest

from fedproxy.data import sources
from fedproxy.data.rows import Row
from fedproxy.data.sources import Columns, files_of, owners_in, read_rows, read_texts
from fedproxy.errors import AssetError, DataError

RECORDS = [{"prompt": f"Q{i}", "target": f"A{i}", "label": i % 2} for i in range(5)]
ROWS = [Row(f"Q{i}", f" A{i}", "mine", f"mine/train/{i}") for i in range(5)]


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def jsonl(path, records):
    return write(path, "".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(params=["jsonl", "json", "csv", "parquet", "save_to_disk", "save_to_disk splits", "folder"])
def source(request, tmp_path):
    """RECORDS in each form that can be read."""
    data = datasets.Dataset.from_list(RECORDS)
    if request.param == "jsonl":
        return jsonl(tmp_path / "data.jsonl", RECORDS)
    if request.param == "json":
        return write(tmp_path / "data.json", json.dumps(RECORDS))
    if request.param == "csv":
        return write(tmp_path / "data.csv", "prompt,target,label\n" + "".join(f"Q{i},A{i},{i % 2}\n" for i in range(5)))
    if request.param == "parquet":
        data.to_parquet(str(tmp_path / "data.parquet"))
        return str(tmp_path / "data.parquet")
    if request.param == "folder":
        jsonl(tmp_path / "train.jsonl", RECORDS)
        return str(tmp_path)
    saved = data if request.param == "save_to_disk" else datasets.DatasetDict(train=data, test=data.select([0]))
    saved.save_to_disk(str(tmp_path / "saved"))
    return str(tmp_path / "saved")


def test_every_kind_of_source_gives_the_same_rows(source):
    assert read_rows("mine", source) == ROWS
    assert read_rows("mine", source, limit=2) == ROWS[:2]


def test_another_split_of_a_folder(tmp_path):
    jsonl(tmp_path / "test.jsonl", RECORDS[:1])
    assert read_rows("mine", str(tmp_path), split="test") == [Row("Q0", " A0", "mine", "mine/test/0")]
    with pytest.raises(DataError, match=r"holds no data file for split 'tests'; did you mean 'test'\?"):
        read_rows("mine", str(tmp_path), split="tests")


def test_a_saved_folder_without_the_split(tmp_path):
    datasets.DatasetDict(train=datasets.Dataset.from_list(RECORDS)).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DataError, match=r"saved holds no split 'trian'; did you mean 'train'\?"):
        read_rows("mine", str(tmp_path / "saved"), split="trian")


@pytest.mark.parametrize(
    ("prompt", "target", "expected"),
    [
        ("Q:", "A", " A"),  # nothing between them: one blank
        ("Q:", " A", " A"),
        ("Q:", "\nA", "\nA"),
        ("Q: ", "A", "A"),  # the prompt brings the blank
        ("Q:\n", "A", "A"),
    ],
)
def test_a_target_carries_its_delimiter(tmp_path, prompt, target, expected):
    (row,) = read_rows("mine", jsonl(tmp_path / "d.jsonl", [{"prompt": prompt, "target": target}]))
    assert (row.prompt, row.target) == (prompt, expected)


def test_columns_have_the_users_names(tmp_path):
    path = jsonl(tmp_path / "d.jsonl", [{"ask": "Q", "say": "A", "mood": m} for m in ("sad", "glad", "sad")])
    rows = read_rows("mine", path, columns=Columns("ask", "say", label="mood"))
    assert [row.label for row in rows] == ["sad", "glad", "sad"]
    assert rows[0].prompt == "Q"
    numbers = jsonl(tmp_path / "n.jsonl", [{"ask": "Q", "say": "A", "mood": m} for m in (7, 3)])
    assert [row.label for row in read_rows("mine", numbers, columns=Columns("ask", "say", label="mood"))] == [7, 3]


def test_a_label_is_the_same_in_every_source(tmp_path):
    words = {"first": ("cold", "flu"), "second": ("asthma", "flu"), "third": ("0", "007")}
    found = {}
    for name, labels in words.items():
        path = write(tmp_path / f"{name}.csv", "prompt,target,dx\n" + "".join(f"Q,A,{label}\n" for label in labels))
        found[name] = [row.label for row in read_rows(name, path, columns=Columns(label="dx"))]
    assert found == {"first": ["cold", "flu"], "second": ["asthma", "flu"], "third": ["0", "007"]}


def test_a_pattern_reads_every_file_once(tmp_path):
    (tmp_path / "set").mkdir()
    path = jsonl(tmp_path / "set" / "train.jsonl", RECORDS)
    (tmp_path / "set" / "again.jsonl").symlink_to(path)
    for pattern in (f"{tmp_path}/set/**", f"{tmp_path}/*t*", f"{tmp_path}/set/*.jsonl"):
        rows = read_rows("mine", pattern)
        assert [row.prompt for row in rows] == [f"Q{i}" for i in range(5)]
        assert [row.key for row in rows] == [f"mine/train/{i}" for i in range(5)]


GOOD = '{"prompt": "Q", "target": "A"}\n'


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("d.jsonl", GOOD + "{'prompt': 1}\n", r"d\.jsonl line 2: it is not valid JSON \(column 2: Expecting property"),
        ("d.jsonl", GOOD + "\n" + '{"prompt": "Q"}\n', r"d\.jsonl line 3 has no column 'target'; known: prompt"),
        ("d.jsonl", '{"promt": "Q", "target": "A"}\n', r"line 1 has no column 'prompt'; did you mean 'promt'\?"),
        ("d.jsonl", GOOD + '{"prompt": 5, "target": "A"}\n', r"line 2: 'prompt' must be text, got int 5"),
        ("d.jsonl", GOOD + '{"prompt": "Q", "target": null}\n', r"line 2: 'target' must be text, got NoneType None"),
        ("d.jsonl", GOOD + '{"prompt": " ", "target": "A"}\n', r"line 2: 'prompt' is empty; fill it in or remove"),
        ("d.jsonl", GOOD + '["Q", "A"]\n', r"line 2: it must hold an object, got list; write one JSON object in each"),
        ("d.jsonl", "", r"d\.jsonl holds no rows \(data set 'mine', split 'train'\)"),
        ("d.jsonl", "\n\n", r"d\.jsonl holds no rows"),
        ("d.json", '{"prompt": "Q"}', r"d\.json: it must hold a list, got dict; write one JSON list of objects"),
        ("d.json", '[{"prompt": "Q",\n]', r"d\.json: it is not valid JSON \(line 2"),
        ("d.json", '[{"prompt": "Q", "target": "A"}, 3]', r"d\.json row 2 must be a JSON object, got int"),
        ("d.csv", "prompt,answer\nQ,A\n", r"d\.csv row 1 \(line 2\) has no column 'target'; known: answer, prompt"),
        ("d.csv", "prompt,target\nQ,A\nQ\n", r"d\.csv row 2 \(line 3\) has 1 fields, the header has 2"),
        ("d.csv", "prompt,target\nQ,A\nQ,A,B\n", r"d\.csv row 2 \(line 3\) has 3 fields, the header has 2"),
        ("d.csv", 'prompt,target\nQ,A\n"Q"x,A\n', r"d\.csv row 2 is not valid CSV"),
        ("d.csv", "prompt,target\nQ,\n", r"d\.csv row 1 \(line 2\): 'target' is empty"),
        ("d.csv", "prompt,target\n", r"d\.csv holds no rows"),
        ("d.parquet", "no parquet", r"d\.parquet is not a readable parquet file"),
        ("d.xlsx", "x", r"d\.xlsx is not of a known kind; .*; convert it to one of them"),
    ],
)
def test_a_broken_file_is_named_with_its_row(tmp_path, file, content, message):
    with pytest.raises(DataError, match=message) as error:
        read_rows("mine", write(tmp_path / file, content))
    assert "\n" not in str(error.value)


def test_text_that_is_not_utf8(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(GOOD.encode() + '{"prompt": "é", "target": "A"}'.encode("latin-1"))
    with pytest.raises(DataError, match=r"d\.jsonl is not UTF-8 text"):
        read_rows("mine", str(tmp_path / "d.jsonl"))


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    (tmp_path / "d.csv").write_bytes(b"\xef\xbb\xbfprompt,target\nQ,A\n")
    assert read_rows("mine", str(tmp_path / "d.csv"))[0].prompt == "Q"


def test_a_damaged_save_to_disk_folder(tmp_path):
    datasets.Dataset.from_list(RECORDS).save_to_disk(str(tmp_path / "saved"))
    for file in (tmp_path / "saved").glob("*.arrow"):
        file.unlink()
    with pytest.raises(DataError, match=r"saved is not a whole save_to_disk folder .*; save the data set again"):
        read_rows("mine", str(tmp_path / "saved"))


@pytest.mark.parametrize("path", ["data/missing.jsonl", "/nowhere/at/all", "./rows", "a/b/c"])
def test_a_missing_file_does_not_go_to_the_hub(path, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(DataError, match="does not exist; give an existing file or folder, asset:NAME or a hub id"):
        read_rows("mine", path)


def test_a_hub_id_is_loaded_by_split(monkeypatch):
    seen = []

    def load(path, split):
        seen.append((path, split))
        return datasets.Dataset.from_list(RECORDS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = read_rows("mine", "someone/data", split="validation")
    assert [row.key for row in rows] == [f"mine/validation/{i}" for i in range(5)]
    assert seen == [("someone/data", "validation")]


def test_a_hub_that_does_not_answer(monkeypatch):
    def load(path, split):
        raise ConnectionError("no route to host\nand much more")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(
        DataError, match=r"someone/data is not a local file .* the hub gave no split .*\(no route to host\)"
    ):
        read_rows("mine", "someone/data")


def test_an_unknown_asset_is_no_hub_id():
    with pytest.raises(AssetError, match="unknown asset 'calibraton'; did you mean 'calibration'"):
        read_texts("asset:calibraton", 1, 0)


def test_texts_are_drawn_by_seed_without_replacement(tmp_path):
    path = jsonl(tmp_path / "t.jsonl", [{"text": f"text {i}", "key": str(i)} for i in range(50)])
    drawn = read_texts(path, 20, 1)
    assert drawn == read_texts(path, 20, 1)
    assert len(set(drawn)) == 20
    assert drawn != read_texts(path, 20, 2)
    assert drawn[:5] == read_texts(path, 5, 1)  # asking for more keeps the first ones
    assert sorted(read_texts(path, 50, 1)) == sorted(f"text {i}" for i in range(50))


def test_texts_of_a_plain_file_are_its_lines(tmp_path):
    assert sorted(read_texts(write(tmp_path / "t.txt", "one\n\n  two  \n"), 2, 0)) == ["one", "two"]


def test_too_few_texts(tmp_path):
    with pytest.raises(DataError, match=r"t\.txt holds 2 texts, 3 are asked for; ask for fewer or add some"):
        read_texts(write(tmp_path / "t.txt", "one\ntwo\n"), 3, 0)


def test_texts_of_an_asset(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDPROXY_CACHE", str(tmp_path))
    texts = read_texts("asset:tiny-calibration", 64, 42)
    assert len(set(texts)) == 64
    assert all(text.endswith(".") for text in texts)


def test_owners_are_read_once_while_a_file_stays(tmp_path, monkeypatch):
    read, path = [], tmp_path / "wards.jsonl"
    path.write_text('{"ward": "north"}\n{"ward": 3}\n')
    records = sources._records
    monkeypatch.setattr(sources, "_records", lambda *args: read.append(args) or records(*args))
    assert owners_in(str(path), "ward") == owners_in(str(path), "ward") == {"north", "3"}
    assert len(read) == 1
    path.write_text('{"ward": "south"}\n')
    assert owners_in(str(path), "ward") == {"south"}


@pytest.mark.parametrize("name", ["wards", "wards/train.jsonl", "war*/train.jsonl"])
def test_a_source_is_the_same_files_whatever_way_it_is_named(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wards").mkdir()
    path = tmp_path / "wards/train.jsonl"
    path.write_text("{}\n")
    assert files_of(name) == files_of(str(tmp_path / name)) == {path}


def test_a_split_that_was_saved_is_its_folder_and_a_hub_id_itself(tmp_path):
    rows = datasets.Dataset.from_list([{"prompt": "a", "target": "b"}])
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "both")
    assert files_of(str(tmp_path / "both"), split="test") == {tmp_path / "both/test"}
    assert files_of("someone/wards") == {Path("someone/wards")}
