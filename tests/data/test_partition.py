"""Partitions: every row has one owner, draws are seeded, heterogeneity is a known number."""

import json

import pytest

from fedproxy.data.partition import Partition, heterogeneity, save_partition
from fedproxy.data.rows import Row
from fedproxy.errors import ConfigError, DataError


def rows(source, count, labels=2, length=1):
    return [
        Row("q" * length * (1 + i % 4), " a", source, f"{source}/train/{i}", label=i % labels) for i in range(count)
    ]


def owners(clients):
    return sorted(row.key for own in clients.values() for row in own)


@pytest.mark.parametrize(
    "partition",
    [
        Partition.by_name("by_task")(),
        Partition.by_name("pooled")(),
        Partition.by_name("iid")(clients=3),
        Partition.by_name("dirichlet")(clients=3, alpha=1.0),
        Partition.by_name("dirichlet")(clients=3, alpha=1.0, by="length"),
        Partition.by_name("dirichlet")(clients=2, alpha=1.0, by="source"),
    ],
)
def test_every_row_has_one_owner_and_the_seed_decides(partition):
    data = rows("a", 40) + rows("b", 30, labels=3)
    clients = partition.split(data, 7)
    assert owners(clients) == sorted(row.key for row in data)
    assert clients == partition.split(data, 7)
    assert list(clients) == sorted(clients)
    assert len(clients) == partition.count(["a"], {"b": "b.jsonl"})


def test_by_task_gives_one_client_per_source():
    clients = Partition.by_name("by_task")().split(rows("b", 3) + rows("a", 2), 0)
    assert {name: len(own) for name, own in clients.items()} == {"a": 2, "b": 3}


def test_iid_shares_differ_by_one_row_at_most():
    sizes = [len(own) for own in Partition.by_name("iid")(clients=3).split(rows("a", 11), 1).values()]
    assert sorted(sizes) == [3, 4, 4]


def test_another_seed_gives_another_partition():
    partition = Partition.by_name("iid")(clients=2)
    assert partition.split(rows("a", 20), 1) != partition.split(rows("a", 20), 2)


def test_small_alpha_skews_labels_more_than_large():
    data = rows("a", 400, labels=4)
    figures = [
        heterogeneity(Partition.by_name("dirichlet")(clients=3, alpha=alpha).split(data, 3))["label"]
        for alpha in (100.0, 0.3)
    ]
    assert figures[0] < 0.1 < figures[1]


def test_heterogeneity_is_the_total_variation_distance():
    # two clients of equal size with one source each, pooled shares 1/2, 1/2: TV = (|1 - .5| + |0 - .5|) / 2 = .5
    figures = heterogeneity({"a": rows("a", 10), "b": rows("b", 10)})
    assert figures["source"] == pytest.approx(0.5)
    assert figures["label"] == pytest.approx(0.0)
    # 10 rows against 30: distances .75 and .25, weighted by rows: (10 * .75 + 30 * .25) / 40 = .375
    assert heterogeneity({"a": rows("a", 10), "b": rows("b", 30)})["source"] == pytest.approx(0.375)


def test_empty_client_is_an_error_that_names_it():
    with pytest.raises(DataError, match=r"client 'client_01' has no rows out of 1"):
        Partition.by_name("iid")(clients=2).split(rows("a", 1), 0)


def test_options_are_checked():
    with pytest.raises(ConfigError, match=r"data.partition.clients must be at least 1, got 0"):
        Partition.by_name("iid")(clients=0)
    with pytest.raises(ConfigError, match=r"data.partition.alpha must be positive, got 0.0"):
        Partition.by_name("dirichlet")(alpha=0.0)


def test_saved_partition_names_rows_and_figures(tmp_path):
    clients = {"a": rows("a", 2), "b": rows("b", 1)}
    save_partition(clients, tmp_path / "partition.json")
    content = json.loads((tmp_path / "partition.json").read_text())
    assert content["clients"] == {"a": ["a/train/0", "a/train/1"], "b": ["b/train/0"]}
    assert set(content["heterogeneity"]) == {"source", "label", "length"}
