"""A site's rows, written once into files that its workers read one client at a time."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from fedproxy.data.partition.rows import ClientRows, held_out_file, rows_file
from fedproxy.data.rows import Row
from fedproxy.errors import DataError
from fedproxy.files import file_sha256
from fedproxy.sealed import content_sha256


class SiteRows(Mapping[str, int]):
    """Clients with their numbers of rows, and a hash of what they are now.

    Args:
        clients: Each client's rows; they are written out and not kept.
        folder: Where the files lie.
        least: Clients with fewer rows take no part.

    Raises:
        DataError: If no client is left.
    """

    def __init__(self, clients: Mapping[str, Sequence[Row]], folder: Path, *, least: int = 1) -> None:
        self.folder = folder
        few = sorted(name for name, rows in clients.items() if trained_on(rows) < least)
        taken = {name: rows for name, rows in clients.items() if name not in few}
        if not taken:
            raise DataError(f"client {few[0]!r} has fewer rows than policy.least_rows={least}, and no other is left")
        for name in _with_held_out(folder, clients):  # of an earlier start
            held_out_file(folder, name).unlink()
        written = ClientRows(taken, folder)
        self._sizes, self.converse = dict(written), written.converse
        self.few = few
        """Clients that are left out."""
        files = [rows_file(folder, name) for name in taken]
        files += [held_out_file(folder, name) for name in _with_held_out(folder, taken)]
        self.sha256 = content_sha256({path.name: file_sha256(path) for path in files})

    def __getitem__(self, client_id: str) -> int:
        """Return how many rows a client has."""
        return self._sizes[client_id]

    def __iter__(self) -> Iterator[str]:
        """Yield the clients' names."""
        return iter(self._sizes)

    def __len__(self) -> int:
        """Return the number of clients."""
        return len(self._sizes)


def trained_on(rows: Sequence[Row]) -> int:
    """Return how many rows are not held back."""
    return sum(not row.held_out for row in rows)


def _with_held_out(folder: Path, clients: Iterable[str]) -> list[str]:
    return [name for name in clients if held_out_file(folder, name).exists()]
