"""Who owns which rows: partitions of the data over clients, saved, and measured for heterogeneity."""

import json
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch.distributions import Dirichlet

from fedproxy.data.partition.owners import read_owners
from fedproxy.data.rows import Row
from fedproxy.errors import DataError
from fedproxy.files import write_text
from fedproxy.names import check_names, file_stem
from fedproxy.registry import Component
from fedproxy.seeding import derive_seed, generator

Clients = dict[str, list[Row]]


@dataclass(frozen=True)
class Partition(Component, family="data.partition"):
    """Splits rows over named clients."""

    def split(self, rows: Sequence[Row], seed: int) -> Clients:
        """Return each client's rows, clients in sorted order.

        Raises:
            ConfigError: If a client's name is not good, or two could be taken for each other.
            DataError: If a client would own no row.
        """
        clients = self.assign(rows, seed)
        check_names(clients, f"data.partition.name={self.name}")
        for client, own in clients.items():
            if not own:
                raise DataError(
                    f"data.partition: client {client!r} has no rows out of {len(rows)}; "
                    f"use fewer clients, more rows or a larger alpha"
                )
        return dict(sorted(clients.items()))

    @abstractmethod
    def assign(self, rows: Sequence[Row], seed: int) -> Clients:
        """Return each client's rows; every row has one owner."""

    @abstractmethod
    def count(self, tasks: Sequence[str], files: Mapping[str, str]) -> int:
        """Return how many clients there will be, given ``data.tasks`` and ``data.files``."""

    @property
    def owner_column(self) -> str | None:
        """Column of data.files that names the client whose row it is, or None."""
        return None


@dataclass(frozen=True)
class ByTask(Partition, name="by_task"):
    """One client per task or file: the paper's heterogeneous setting."""

    def count(self, tasks: Sequence[str], files: Mapping[str, str]) -> int:
        """Return the number of sources."""
        return len(tasks) + len(files)

    def assign(self, rows: Sequence[Row], seed: int) -> Clients:
        """Group rows by their source."""
        clients: Clients = {}
        for row in rows:
            clients.setdefault(row.source, []).append(row)
        return clients


@dataclass(frozen=True)
class Pooled(Partition, name="pooled"):
    """One client that owns everything: centralised tuning."""

    column: str | None = None
    """Column of data.files that names whose row it was, so that by_column's held-out rows are held out here, too."""

    @property
    def owner_column(self) -> str | None:
        """Return the column."""
        return self.column

    def count(self, tasks: Sequence[str], files: Mapping[str, str]) -> int:
        """Return 1."""
        return 1

    def assign(self, rows: Sequence[Row], seed: int) -> Clients:
        """Give all rows to the client ``pooled``."""
        return {"pooled": list(rows)}


@dataclass(frozen=True)
class Iid(Partition, name="iid"):
    """Equal random shares: the paper's homogeneous setting."""

    clients: int = 4
    """Number of clients."""

    def __post_init__(self) -> None:
        """Check the options."""
        self.require("clients", self.clients >= 1, "at least 1")

    def count(self, tasks: Sequence[str], files: Mapping[str, str]) -> int:
        """Return the number asked for."""
        return self.clients

    def assign(self, rows: Sequence[Row], seed: int) -> Clients:
        """Deal shuffled rows in turn, so that shares differ by one row at most."""
        order = torch.randperm(len(rows), generator=generator(seed, "partition")).tolist()
        names = _client_names(self.clients)
        return {name: [rows[i] for i in order[k :: self.clients]] for k, name in enumerate(names)}


@dataclass(frozen=True)
class DirichletSkew(Partition, name="dirichlet"):
    """Shares of each category drawn from Dir(alpha): smaller alpha, more skew (Hsu et al. 2019, arXiv 1909.06335)."""

    clients: int = 4
    """Number of clients."""
    alpha: float = 0.5
    """Concentration; 0.1 is strong skew, 100 is nearly IID."""
    by: Literal["label", "length", "source"] = "label"
    """Category that is skewed: gold choice, quartile of the text's length, or task."""

    def __post_init__(self) -> None:
        """Check the options."""
        self.require("clients", self.clients >= 1, "at least 1")
        self.require("alpha", self.alpha > 0, "positive")

    def count(self, tasks: Sequence[str], files: Mapping[str, str]) -> int:
        """Return the number asked for."""
        return self.clients

    def assign(self, rows: Sequence[Row], seed: int) -> Clients:
        """Split every category's shuffled rows by its own draw from the Dirichlet distribution."""
        names = _client_names(self.clients)
        clients: Clients = {name: [] for name in names}
        category = _CATEGORIES[self.by](rows)
        for value in sorted(set(category)):
            own = [row for row, found in zip(rows, category, strict=True) if found == value]
            order = torch.randperm(len(own), generator=generator(seed, "partition", value)).tolist()
            with torch.random.fork_rng(devices=[]):  # torch.distributions takes no generator
                torch.manual_seed(derive_seed(seed, "dirichlet", value))
                shares = Dirichlet(torch.full((self.clients,), self.alpha, dtype=torch.float64)).sample()
            cuts = [0, *(shares.cumsum(0) * len(own)).round().int().tolist()]
            for k, name in enumerate(names):
                clients[name] += [own[i] for i in order[cuts[k] : cuts[k + 1]]]
        return clients


def heterogeneity(clients: Mapping[str, Sequence[Row]]) -> dict[str, float]:
    """Return how far clients' data are from the pooled data, in [0, 1), by source, label and length.

    Each figure is the total variation distance between a client's category shares and the pooled shares, averaged over
    clients with their row counts as weights: 0 means every client has the same mix.
    """
    names = [name for name, own in clients.items() for _ in own]
    rows = [row for own in clients.values() for row in own]
    return {by: _mean_distance(names, find(rows)) for by, find in _CATEGORIES.items()}


def save_partition(clients: Mapping[str, Sequence[Row]], path: Path) -> dict[str, float]:
    """Write which rows (by key) each client owns, what its files are called, and the heterogeneity figures.

    Only the owner may read it.

    Returns:
        The figures, see :func:`heterogeneity`.

    Raises:
        CheckpointError: If it cannot be written.
    """
    figures = heterogeneity(clients)
    content = {
        "heterogeneity": figures,
        "clients": {name: [row.key for row in own] for name, own in clients.items()},
        "files": {name: file_stem(name) for name in clients},
    }
    write_text(path, json.dumps(content, indent=1) + "\n", private=True)
    return figures


def check_same_owners(clients: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Compare with the partition that a run began with, where one is there.

    Raises:
        DataError: If a row has another owner now, where the message names a client, or the file cannot be used.
    """
    if not path.exists():
        return
    way_out = "put back the file that the run wrote, or delete it and resume=auto writes it anew from the recipe"
    before = read_owners(path, f"resume=auto: {path}, which says with whose rows the run began,", way_out)
    now = {name: [row.key for row in own] for name, own in clients.items()}
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if changed:
        raise DataError(
            f"resume=auto: client {changed[0]!r} owns other rows than in {path}, with which the run began; give its "
            f"rows back, or begin another run with data.partition.name=file in another output_dir"
        )


def _client_names(count: int) -> list[str]:
    width = max(2, len(str(count - 1)))
    return [f"client_{k:0{width}d}" for k in range(count)]


def _sources(rows: Sequence[Row]) -> list[str]:
    return [row.source for row in rows]


def _labels(rows: Sequence[Row]) -> list[str]:
    return ["none" if row.label is None else str(row.label) for row in rows]


def _length_quartiles(rows: Sequence[Row]) -> list[str]:
    lengths = torch.tensor([float(len(row.prompt) + len(row.target)) for row in rows])
    bounds = torch.quantile(lengths, torch.tensor([0.25, 0.5, 0.75]))
    return [str(int(quartile)) for quartile in torch.bucketize(lengths, bounds)]


_CATEGORIES: dict[str, Callable[[Sequence[Row]], list[str]]] = {
    "source": _sources,
    "label": _labels,
    "length": _length_quartiles,
}


def _mean_distance(names: Sequence[str], category: Sequence[str]) -> float:
    pooled, total = Counter(category), len(category)
    by_client: dict[str, Counter[str]] = {}
    for name, value in zip(names, category, strict=True):
        by_client.setdefault(name, Counter())[value] += 1
    distance = 0.0
    for counts in by_client.values():
        size = counts.total()
        distance += size / total * sum(abs(counts[v] / size - pooled[v] / total) for v in pooled) / 2
    return distance
