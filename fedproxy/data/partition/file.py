"""Partitions written by hand: who owns which rows, read from a file like the one that every run leaves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedproxy.data.partition.base import Clients, Partition
from fedproxy.data.partition.owners import read_owners
from fedproxy.data.rows import Row
from fedproxy.errors import DataError, nearest, one_line


@dataclass(frozen=True)
class PartitionFile(Partition, name="file"):
    """Owners read from a JSON file: a run's partition.json, edited or not, or one written by hand.

    ``{"clients": {"ward_a": ["arc_easy/train/17", "notes"], ...}}``: a client's list holds rows by key, and names of
    tasks or files for all of their rows. Every row has at most one owner; rows that nobody owns are left out.
    """

    path: str
    """The file."""

    def count(self, tasks: Sequence[str], files: Mapping[str, str]) -> int:
        """Return how many clients the file names."""
        return len(self._read())

    def assign(self, rows: Sequence[Row], seed: int) -> Clients:
        """Give every client the rows that the file names, in the file's order.

        Raises:
            DataError: If the file is damaged, names a row that there is not, or gives a row two owners.
        """
        by_key = {row.key: row for row in rows}
        by_source: dict[str, list[Row]] = {}
        for row in rows:
            by_source.setdefault(row.source, []).append(row)
        owner: dict[str, str] = {}
        clients: Clients = {}
        for client, entries in self._read().items():
            clients[client] = []
            for entry in entries:
                for row in by_source.get(entry) or [self._row(entry, client, by_key, by_source)]:
                    if row.key in owner:
                        raise DataError(
                            f"data.partition.path={self.path}: row {row.key!r} is given to {owner[row.key]!r} and "
                            f"{client!r}; leave it to one client, once"
                        )
                    owner[row.key] = client
                    clients[client].append(row)
        return clients

    def _row(self, entry: str, client: str, by_key: dict[str, Row], by_source: dict[str, list[Row]]) -> Row:
        if entry in by_key:
            return by_key[entry]
        raise DataError(
            f"data.partition.path={self.path}: client {client!r} is given {one_line(repr(entry), 60)}, which is not a "
            f"row or a source of this run's {len(by_key)} rows{nearest(entry, by_source)}; correct it, or raise "
            "data.rows_per_task"
        )

    def _read(self) -> dict[str, list[str]]:
        where = f"data.partition.path={self.path}"
        return read_owners(Path(self.path), where, "give a file like a run's partition.json")
