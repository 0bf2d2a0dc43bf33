"""Partitions that the rows themselves name: a file of several clients' rows, with a column that says whose each is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedproxy.data.partition import Clients, Partition
from fedproxy.data.rows import Row
from fedproxy.data.sources import owners_in


@dataclass(frozen=True)
class ByColumn(Partition, name="by_column"):
    """One client for each value of a column of data.files; rows of a task are the client's of the task's name."""

    column: str
    """The column: texts, or whole numbers."""

    @property
    def owner_column(self) -> str | None:
        """Return the column."""
        return self.column

    def count(self, tasks: Sequence[str], files: Mapping[str, str]) -> int:
        """Return how many values the column has in all files, which are read for it, and tasks there are."""
        return len(set(tasks).union(*(owners_in(path, self.column) for path in files.values())))

    def assign(self, rows: Sequence[Row], seed: int) -> Clients:
        """Group rows by whom their column names."""
        clients: Clients = {}
        for row in rows:
            clients.setdefault(row.source if row.owner is None else row.owner, []).append(row)
        return clients
