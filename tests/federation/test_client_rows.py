"""Rows on disk: one file per client, the latest few in memory, owners edited by hand."""

import json

import pytest

from fedproxy.data.assets import resolve
from fedproxy.data.rows import Row
from fedproxy.errors import DataError
from fedproxy.federation.client_rows import ClientExamples, ClientRows, read_client_rows, rows_file
from fedproxy.federation.partition import Partition, check_same_owners, save_partition
from fedproxy.federation.partition_file import PartitionFile
from fedproxy.models import load_tokenizer

from .test_partition import rows


def test_rows_come_back_equal_from_files_of_their_own(tmp_path):
    clients = {"../a": [Row("p\n", " é", "s", "s/train/0", 1)], "b b": rows("b", 2)}
    kept = ClientRows(clients, tmp_path / "rows")
    assert {name: read_client_rows(tmp_path / "rows", name) for name in clients} == clients
    assert dict(kept) == {"../a": 1, "b b": 2}
    assert {path.name for path in (tmp_path / "rows").iterdir()} == {"..%2Fa.jsonl", "b b.jsonl"}
    assert "unknown" not in kept


def test_a_damaged_file_names_the_client(tmp_path):
    ClientRows({"a": rows("a", 2)}, tmp_path)
    rows_file(tmp_path, "a").write_text('{"prompt": 1')
    with pytest.raises(DataError, match=r"a.jsonl with the rows of client 'a' cannot be read .*; resume=auto writes"):
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
    assert again.count(7) == 2


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
        ({"clients": {"x": "a"}}, r"client 'x' must have a name and a list of row keys or source names"),
        ({"clients": {"x": []}}, r"client 'x' has no rows out of 5"),
        ({"clients": {"x": ["a/train/3"]}}, r"client 'x' is given 'a/train/3', which is no row and no source of"),
        ({"clients": {"x": ["a"], "y": ["a/train/1"]}}, r"row 'a/train/1' is given to 'x' and 'y'; leave it to one"),
        ({"clients": {"x": ["b", "b"]}}, r"row 'b/train/0' is given to 'x' and 'x'"),
    ],
)
def test_a_wrong_partition_file_is_one_line(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        by_file(tmp_path / "p.json", content).split(DATA, 0)


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
        ('{"clients": {"x": 3}}', r"client 'x' must have a name and a list"),
        ("[1]", r'must hold {"clients"'),
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
