"""Rows on disk: one file per client, the latest few in memory, owners edited by hand."""

import json
import os

import pytest

from fedproxy.data.assets import resolve
from fedproxy.data.partition import Partition, check_same_owners, save_partition
from fedproxy.data.partition.file import PartitionFile
from fedproxy.data.partition.rows import ClientRows, read_client_rows, rows_file
from fedproxy.data.rows import Row
from fedproxy.errors import ConfigError, DataError
from fedproxy.federation.client.rows import ClientExamples
from fedproxy.models import load_tokenizer
from fedproxy.names import file_stem

from .test_partition import rows


def test_rows_come_back_equal_from_files_of_their_own(tmp_path):
    clients = {"../a": [Row("p\n", " é", "s", "s/train/0", 1, ends=True)], "b b": rows("b", 2), "北" * 99: rows("c", 1)}
    kept = ClientRows(clients, tmp_path / "rows")
    assert {name: read_client_rows(tmp_path / "rows", name) for name in clients} == clients
    assert dict(kept) == {"../a": 1, "b b": 2, "北" * 99: 1}
    assert {path.name for path in (tmp_path / "rows").iterdir()} == {f"{file_stem(name)}.jsonl" for name in clients}
    assert "unknown" not in kept


def test_a_damaged_file_names_the_client(tmp_path):
    ClientRows({"a": rows("a", 2)}, tmp_path)
    rows_file(tmp_path, "a").write_text('{"prompt": 1')
    with pytest.raises(
        DataError, match=r"a-.*.jsonl with the rows of client 'a' cannot be read .*; resume=auto writes"
    ):
        read_client_rows(tmp_path, "a")


def test_the_latest_clients_stay_in_memory_and_no_more(tmp_path):
    ClientRows({f"c{k}": rows("a", 2 + k) for k in range(5)}, tmp_path)
    tokenizer = load_tokenizer(resolve("asset:tiny-llama"))
    examples = ClientExamples(tmp_path, tokenizer, max_input_tokens=8, max_target_tokens=8, keep=2)
    for k in range(5):
        assert len(examples[f"c{k}"]) == 2 + k
    assert list(examples) == ["c3", "c4"]
    first = examples["c3"]
    assert examples["c3"] is first
    examples["c0"]
    assert list(examples) == ["c3", "c0"]  # c4 was used longest ago


def by_file(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return PartitionFile(path=str(path))


DATA = rows("a", 3) + rows("b", 2)


def test_a_runs_partition_file_gives_the_same_owners(tmp_path):
    clients = Partition.by_name("iid")(clients=2).split(DATA, 5)
    save_partition(clients, tmp_path / "partition.json")
    again = PartitionFile(path=str(tmp_path / "partition.json"))
    assert again.split(DATA, 0) == clients
    assert again.count([], {}) == 2


def test_rows_and_whole_sources_are_given_by_hand_and_the_rest_is_left_out(tmp_path):
    partition = by_file(tmp_path / "p.json", {"clients": {"two": ["b"], "one": ["a/train/2", "a/train/0"]}})
    clients = partition.split(DATA, 0)
    assert {name: [row.key for row in own] for name, own in clients.items()} == {
        "one": ["a/train/2", "a/train/0"],
        "two": ["b/train/0", "b/train/1"],
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"cannot be read as JSON"),
        ('{"clients": {"x": ["a"], "x": ["b"]}}', r"'x' stands twice in one object"),
        ({"owners": {}}, r'must hold \{"clients": \{name: \[row keys\]\}\} with at least one client'),
        ({"clients": {}}, r"with at least one client"),
        ({"clients": {"x": "a"}}, r"client 'x' must have a list of row keys or source names"),
        ({"clients": {"x": []}}, r"client 'x' has no rows out of 5"),
        ({"clients": {"x": ["a/train/3"]}}, r"client 'x' is given 'a/train/3', which is not a row or a source of"),
        ({"clients": {"x": ["a"], "y": ["a/train/1"]}}, r"row 'a/train/1' is given to 'x' and 'y'; leave it to one"),
        ({"clients": {"x": ["b", "b"]}}, r"row 'b/train/0' is given to 'x' and 'x'"),
    ],
)
def test_a_wrong_partition_file_is_one_line(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        by_file(tmp_path / "p.json", content).split(DATA, 0)


@pytest.mark.parametrize("names", [("Ward", "ward"), ("w" * 101, "x"), ("a\nb", "x"), (" a", "x"), ("", "x")])
def test_names_of_clients_are_checked_whatever_gives_them(tmp_path, names):
    sources = [Row("p", " t", name, f"{name}/train/0") for name in names]
    with pytest.raises(ConfigError, match=r"data.partition.name=by_task: (a name must be|the names 'Ward' and 'ward')"):
        Partition.by_name("by_task")().split(sources, 0)
    with pytest.raises(ConfigError, match=r"p.json: (a name must be a text of|the names 'Ward' and 'ward' differ)"):
        by_file(tmp_path / "p.json", {"clients": {name: ["a"] for name in names}}).split(DATA, 0)


def test_the_partition_says_what_each_clients_files_are_called(tmp_path):
    save_partition({"Ward A": DATA, "北": DATA[:1]}, tmp_path / "partition.json")
    files = json.loads((tmp_path / "partition.json").read_text())["files"]
    assert files == {name: file_stem(name) for name in ("Ward A", "北")}


def test_a_partition_that_is_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "p.json")
    with pytest.raises(
        DataError, match=r"p.json cannot be read as JSON \(it is not a regular file\); give a file like"
    ):
        PartitionFile(path=str(tmp_path / "p.json")).split(DATA, 0)


def test_clients_cut_rows_to_the_models_positions(tmp_path):
    ClientRows({"a": [Row("word " * 90, " yes", "s", "s/train/0", ends=True)]}, tmp_path)
    tokenizer = load_tokenizer(resolve("asset:tiny-llama"))
    limits = {"max_input_tokens": 400, "max_target_tokens": 8}
    (whole,), (fitting,) = (ClientExamples(tmp_path, tokenizer, **limits, max_tokens=most)["a"] for most in (None, 16))
    assert len(whole.input_ids) > 16 == len(fitting.input_ids)
    assert fitting.input_ids[-1] == tokenizer.eos_token_id


def test_owners_may_not_change_within_a_run(tmp_path):
    path = tmp_path / "partition.json"
    check_same_owners({"x": DATA}, path)  # nothing to compare with yet
    save_partition({"x": DATA[:3], "y": DATA[3:]}, path)
    check_same_owners({"x": DATA[:3], "y": DATA[3:]}, path)
    with pytest.raises(DataError, match=r"resume=auto: client 'x' owns other rows than in .*partition.json"):
        check_same_owners({"x": DATA[:2], "y": DATA[2:]}, path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"clients": []}', r'must hold {"clients": {name: \[row keys\]}} with at least one client'),
        ('{"clients": {"x": 3}}', r"client 'x' must have a list"),
        ("[1]", r"cannot be read as JSON \(it must hold an object, got list\)"),
        ('{"clients": {"x": ["a', r"cannot be read as JSON"),
        ("[" * 10**6, r"cannot be read as JSON"),
    ],
)
def test_a_runs_own_partition_file_that_was_spoilt_is_one_line(tmp_path, content, message):
    path = tmp_path / "partition.json"
    path.write_text(content)
    with pytest.raises(DataError, match=rf"^resume=auto: .*partition.json, .*{message}.*; .*delete it and resume=auto"):
        check_same_owners({"x": DATA}, path)
    assert path.read_text() == content
