"""Rows that lie at real sites: the server deals none out, and learns names and numbers alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedproxy.data.partition.base import Clients, Partition
from fedproxy.data.rows import Row
from fedproxy.errors import DataError


@dataclass(frozen=True)
class AtSites(Partition, name="sites"):
    """Every data owner has rows of its own (``engine.name=flower``); the server sees their clients' names and counts.

    ``data.tasks`` are then what models are scored on, and no row of theirs is anybody's.
    """

    clients: int = 2
    """Clients that the sites hold together."""

    def __post_init__(self) -> None:
        """Check the options."""
        self.require("clients", self.clients >= 1, "at least 1")

    def count(self, tasks: Sequence[str], files: Mapping[str, str]) -> int:
        """Return the number of clients."""
        return self.clients

    def assign(self, rows: Sequence[Row], seed: int) -> Clients:
        """Refuse: there is nothing to deal out.

        Raises:
            DataError: Always.
        """
        raise DataError("data.partition.name=sites: the rows lie at the sites; run it with engine.name=flower")
