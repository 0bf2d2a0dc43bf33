"""Data files as other programs write them, and those that are broken or laid as a trap: each is read or is one line."""

import json
import os
import struct
import tracemalloc

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedproxy.data import readers
from fedproxy.data.loading import load_from_hub
from fedproxy.data.sources import Columns, count_texts, read_rows, read_texts
from fedproxy.errors import DataError

GOOD = '{"prompt": "Q", "target": "A"}\n'
ROWS = [{"prompt": f"Q{i}", "target": f"A{i}"} for i in range(5)]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("d.jsonl", b"\xef\xbb\xbf" + GOOD.encode()),
        ("d.jsonl", GOOD.replace("\n", "\r\n") + "\r\n"),
        ("d.JSONL", GOOD),
        ("d.json", b"\xef\xbb\xbf[" + GOOD.encode() + b"]"),
        ("d.csv", "\ufeffprompt,target\r\nQ,A\r\n\r\n"),
        ("d.csv", "prompt,target,,\nQ,A,,\n"),  # columns without a name cannot be asked for
        ("d.csv", "prompt,target\rQ,A\r"),
    ],
)
def test_files_of_other_systems_give_the_same_row(tmp_path, file, content):
    (row,) = read_rows("mine", write(tmp_path / file, content))
    assert (row.prompt, row.target) == ("Q", " A")


def test_characters_that_look_like_the_end_of_a_line_are_not_one(tmp_path):
    prompt = "one\u2028two\u2029three\x85four\x0c"
    path = write(tmp_path / "d.jsonl", json.dumps({"prompt": prompt, "target": "A"}, ensure_ascii=False) + "\n")
    assert read_rows("mine", path)[0].prompt == prompt
    assert count_texts(write(tmp_path / "t.txt", "one\u2028two\n\x85\nthree\n")) == 2  # the second line is blank


def test_a_csv_field_may_be_longer_than_pythons_reader_allows_by_itself(tmp_path):
    text = "long text " * 20_000  # 200,000 characters; the default limit is 131,072
    rows = read_rows("mine", write(tmp_path / "d.csv", f'prompt,target\n"{text}",yes\nshort,no\n'))
    assert [row.prompt for row in rows] == [text, "short"]


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("d.jsonl", r"d\.jsonl line 2 has more than 67108864 characters; break it into several rows"),
        ("d.csv", r"d\.csv line 2 has more than 67108864 characters"),
        ("d.json", r"d\.json cannot be read \(it has 1610612736 bytes, 268435456 are the most that is read\)"),
    ],
)
def test_a_file_is_not_read_into_memory_whatever_its_size(tmp_path, file, message):
    path = write(tmp_path / file, "prompt,target\n" if file == "d.csv" else GOOD)
    os.truncate(path, 3 << 29)  # zeros to the end, which take no room on the disk
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=message):
            read_rows("mine", path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 29
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("d.jsonl", GOOD + "[" * 200_000, r"d\.jsonl line 2: it is nested too deeply; write one JSON object"),
        ("d.jsonl", GOOD + '{"a": ' * 200_000, r"d\.jsonl line 2: it is nested too deeply"),
        ("d.jsonl", '{"prompt": 1' + "0" * 5000 + "}", r"d\.jsonl line 1: it cannot be read \(Exceeds the limit"),
        ("d.json", "[" * 200_000, r"d\.json: it is nested too deeply; write one JSON list of objects"),
        ("d.json", GOOD * 2, r"d\.json: it is not valid JSON \(line 2: Extra data\); .*\.jsonl holds an object a line"),
        ("d.jsonl", json.dumps(ROWS[0], indent=1), r"d\.jsonl line 1: it is not valid JSON"),
        ("d.jsonl", '{"prompt": "a\tb", "target": "c"}', r"d\.jsonl line 1: it is not valid JSON \(column 14: Invalid"),
        ("d.jsonl", '{"prompt": "a", "target": NaN}', r"line 1: 'target' must be text, got float nan; put it into"),
        ("d.jsonl", r'{"prompt": "\ud800", "target": "A"}', r"line 1: 'prompt' holds half a character .*at 0"),
        (
            "d.jsonl",
            '{"prompt": "Q", "target": "A", "prompt": "R"}',
            r"line 1: it cannot be read \('prompt' stands twice in one object",
        ),
        (
            "d.json",
            '[{"prompt": "Q", "target": "A", "target": ""}]',
            r"d\.json: it cannot be read \('target' stands twice in one object",
        ),
        ("d.csv", "prompt,target,prompt\nQ,A,R\n", r"d\.csv line 1 has two columns named 'prompt'; rename or remove"),
        ("d.csv", "prompt;target\nQ;A\n", r"d\.csv line 1 separates its columns by ';'; save it with commas"),
        ("d.csv", "id\ttarget\tprompt\n1\tA\tQ\n", r"d\.csv line 1 separates its columns by '\\t'; save it"),
        ("d.csv", "question;answer\nQ;A\n", r"d\.csv row 1 \(line 2\) has no column 'prompt'; known: question;"),
        ("d.csv", 'prompt,target\nQ,"A\nand so on\n', r"d\.csv row 1 is not valid CSV"),
        ("d.csv", "prompt,target\nQ,A\n".encode("utf-16"), r"d\.csv is not UTF-8 text \(byte 0\)"),
        ("d.jsonl", '{"messages": [{"role": "user", "content": "hi"}]}', r"line 1 has no column 'prompt'; known: mess"),
        ("d.jsonl", json.dumps({"\x1b[31mQ" * 99: 1}), r"line 1 has no column 'prompt'; known: Q Q Q "),
        ("d.parquet", b"PAR1" + b"\0" * 40 + b"PAR1", r"d\.parquet is not a readable parquet file"),
        ("d.parquet", b"version https://git-lfs.github.com/spec/v1\n", r"d\.parquet is not a readable parquet file"),
        ("d.parquet", b"", r"d\.parquet is not a readable parquet file"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, file, content, message):
    with pytest.raises(DataError, match=message) as error:
        read_rows("mine", write(tmp_path / file, content))
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("suffix", readers.SUFFIXES)
def test_a_pipe_is_refused_and_not_waited_for(tmp_path, suffix):
    os.mkfifo(tmp_path / f"d{suffix}")
    with pytest.raises(DataError, match=rf"d\{suffix} cannot be read \(it is not a regular file\); check the file"):
        read_rows("mine", str(tmp_path / f"d{suffix}"))


@pytest.mark.parametrize("path", ["", "  ", "x" * 5000, "~nobody-here/x", "a\0b", "json", "csv", "imagefolder"])
def test_what_cannot_be_a_path_is_one_line_and_asks_nobody(path, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(DataError, match=r"cannot be a path|does not exist; give|a path of data is empty; give"):
        read_rows("mine", path)


def parquet(path, columns):
    pq.write_table(pa.table(columns), path)
    return str(path)


TEXTS = ["x", "y"]


@pytest.mark.parametrize(
    "column",
    [pa.array(TEXTS, pa.large_string()), pa.array(TEXTS).dictionary_encode(), pa.array(TEXTS, pa.string_view())],
)
def test_text_of_every_arrow_kind_is_text(tmp_path, column):
    rows = read_rows("mine", parquet(tmp_path / "d.parquet", {"prompt": column, "target": TEXTS}))
    assert [row.prompt for row in rows] == TEXTS


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": TEXTS, "target": [1, 2]}, r"row 1: 'target' must be text, got int 1"),
        ({"prompt": TEXTS, "target": ["x", None]}, r"row 2: 'target' must be text, got NoneType"),
        ({"prompt": TEXTS, "target": [["x"], ["y"]]}, r"column 'target' must hold text or numbers, got list<"),
        ({"prompt": TEXTS, "target": [b"x", b"y"]}, r"column 'target' must hold text or numbers, got binary"),
        ({"prompt": TEXTS, "answer": TEXTS}, r"d\.parquet has no column 'target'; known: answer, prompt"),
    ],
)
def test_a_parquet_column_of_another_kind_is_named(tmp_path, columns, message):
    with pytest.raises(DataError, match=message):
        read_rows("mine", parquet(tmp_path / "d.parquet", columns))


def test_two_parquet_columns_of_one_name_are_refused(tmp_path):
    pq.write_table(pa.Table.from_arrays([pa.array(TEXTS)] * 3, ["prompt", "target", "target"]), tmp_path / "d.parquet")
    with pytest.raises(DataError, match=r"d\.parquet has two columns named 'target'"):
        read_rows("mine", str(tmp_path / "d.parquet"))


def test_text_that_is_not_utf8_inside_a_parquet_file(tmp_path):
    texts = pa.StringArray.from_buffers(1, pa.py_buffer(struct.pack("<ii", 0, 2)), pa.py_buffer(b"\xff\xfe"))
    with pytest.raises(DataError, match=r"d\.parquet is not a readable parquet file \(.*utf-8"):
        read_rows("mine", parquet(tmp_path / "d.parquet", {"prompt": texts, "target": ["x"]}))


PICTURES = [{"bytes": b"x", "path": "/etc/hostname"}, {"bytes": b"x", "path": "http://192.0.2.1/a.png"}]


@pytest.fixture
def pictured():
    """Rows with a column of pictures: to decode one without bytes is to open its path, or to ask its address."""
    table = pa.table({"prompt": TEXTS, "target": TEXTS, "text": TEXTS, "picture": PICTURES, "mood": [3, 4]})
    kinds = {name: datasets.Value("string") for name in ("prompt", "target", "text")}
    features = datasets.Features(**kinds, picture=datasets.Image(), mood=datasets.ClassLabel(num_classes=5))
    return datasets.Dataset(table.cast(features.arrow_schema))


@pytest.mark.parametrize("kind", ["saved", "saved splits", "parquet", "hub"])
def test_a_column_of_pictures_is_never_read(tmp_path, monkeypatch, pictured, kind):
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *_, **__: pytest.fail("decoded a picture"))
    path = str(tmp_path / "data")
    if kind == "parquet":
        path += ".parquet"
        pictured.to_parquet(path)
    elif kind == "hub":
        path = "someone/data"
        monkeypatch.setattr(datasets, "load_dataset", lambda path, split: pictured)
    else:
        (pictured if kind == "saved" else datasets.DatasetDict(train=pictured)).save_to_disk(path)
    rows = read_rows("mine", path, columns=Columns(label="mood"))
    assert [(row.prompt, row.target, row.label) for row in rows] == [("x", " x", 3), ("y", " y", 4)]
    assert sorted(read_texts(path, 2, 0)) == TEXTS
    with pytest.raises(DataError, match=r"column 'picture' must hold text or numbers, got struct<"):
        read_rows("mine", path, columns=Columns(target="picture"))


def saved(folder):
    datasets.Dataset.from_list(ROWS).save_to_disk(str(folder))
    return folder


def test_a_saved_folder_of_several_files_keeps_the_order(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "d"), num_shards=3)
    assert [row.prompt for row in read_rows("mine", str(tmp_path / "d"))] == [row["prompt"] for row in ROWS]


def cut(folder):
    (arrow,) = folder.glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:-200])


def flip(folder):
    (arrow,) = folder.glob("*.arrow")
    arrow.write_bytes(b"\xff" * 64 + arrow.read_bytes()[64:])


def pipe(folder):
    (arrow,) = folder.glob("*.arrow")
    arrow.unlink()
    os.mkfifo(arrow)


def state(content):
    return lambda folder: (folder / "state.json").write_text(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "is not a whole save_to_disk folder"),
        (flip, "is not a whole save_to_disk folder"),
        (pipe, r"is not a whole save_to_disk folder \(it is not a regular file\)"),
        (state("{"), "state.json cannot be read: it is not valid JSON"),
        (state("[" * 200_000), "state.json cannot be read: it is nested too deeply"),
        (state("[]"), "state.json cannot be read: it must hold an object"),
        (state("{}"), r"its state.json does not list its files"),
        (state('{"_data_files": [{"filename": "../elsewhere.arrow"}]}'), "it names a file outside of the folder"),
        (state('{"_data_files": [{"filename": "/etc/passwd"}]}'), "it names a file outside of the folder"),
        (state('{"_data_files": 5}'), "is not a whole save_to_disk folder"),
        (lambda folder: (folder / "state.json").unlink(), "state.json cannot be read: No such file"),
        (lambda folder: (folder / "dataset_dict.json").write_text('{"splits": 3}'), "holds no split 'train'"),
        (lambda folder: (folder / "dataset_dict.json").write_text("nothing"), r"dataset_dict.json cannot be read"),
    ],
)
def test_a_damaged_saved_folder_is_one_line(tmp_path, damage, message):
    damage(saved(tmp_path / "d"))
    with pytest.raises(DataError, match=message) as error:
        read_rows("mine", str(tmp_path / "d"))
    assert "\n" not in str(error.value)


def test_a_split_file_is_found_whatever_the_case_of_its_ending(tmp_path):
    write(tmp_path / "train.JSONL", GOOD)
    assert len(read_rows("mine", str(tmp_path))) == 1


def test_what_breaks_while_a_hub_set_is_read_is_one_line(monkeypatch):
    class Broken(datasets.Dataset):
        def iter(self, *_, **__):
            raise pa.ArrowInvalid("one line\nand another")

    monkeypatch.setattr(datasets, "load_dataset", lambda path, split: datasets.Dataset.from_list(ROWS))
    monkeypatch.setattr(datasets.Dataset, "iter", Broken.iter)
    with pytest.raises(DataError, match=r"someone/data train is not a whole data set \(one line and another\); delete"):
        read_rows("mine", "someone/data")


def test_no_script_beside_data_is_run(tmp_path, monkeypatch):
    (tmp_path / "someone").mkdir()
    (tmp_path / "someone" / "someone.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    for path in (tmp_path / "someone", tmp_path / "someone" / "someone.py"):
        with pytest.raises(DataError, match="someone"):
            read_rows("mine", str(path))
        with pytest.raises(DataError, match="the hub gave no split"):
            load_from_hub(str(path), "train")
    assert not (tmp_path / "ran").exists()
