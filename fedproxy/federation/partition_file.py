"""Partitions written by hand: who owns which rows, read from a file like the one that every run leaves."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedproxy.data.rows import Row
from fedproxy.errors import DataError, nearest
from fedproxy.federation.partition import Clients, Partition


@dataclass(frozen=True)
class PartitionFile(Partition, name="file"):
    """Owners read from a JSON file: a run's partition.json, edited or not, or one written by hand.

    ``{"clients": {"ward_a": ["arc_easy/train/17", "notes"], ...}}``: a client's list holds rows by key, and names of
    tasks or files for all of their rows. Every row has at most one owner; rows that nobody owns are left out.
    """

    path: str
    """The file."""

    def count(self, sources: int) -> int:
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
            f"data.partition.path={self.path}: client {client!r} is given {entry!r}, which is no row and no source of "
            f"this run's {len(by_key)} rows{nearest(entry, by_source)}; correct it, or raise data.rows_per_task"
        )

    def _read(self) -> dict[str, list[str]]:
        where = f"data.partition.path={self.path}"
        try:
            content = json.loads(Path(self.path).read_text(encoding="utf-8"), object_pairs_hook=_without_twins)
        except (OSError, ValueError) as error:
            raise DataError(
                f"{where} cannot be read as JSON ({error}); give a file like a run's partition.json"
            ) from error
        clients = content.get("clients") if isinstance(content, dict) else None
        if not isinstance(clients, dict) or not clients:
            raise DataError(f'{where} must hold {{"clients": {{name: [row keys]}}}} with at least one client')
        for client, entries in clients.items():
            if not (client and isinstance(entries, list) and all(isinstance(entry, str) for entry in entries)):
                raise DataError(f"{where}: client {client!r} must have a name and a list of row keys or source names")
        return clients


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twin = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twin!r} stands twice in one object")
    return content
