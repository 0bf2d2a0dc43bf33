"""A site's rows, written once into files that its workers read one client at a time."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from fedproxy.data.partition.rows import ClientRows, rows_file
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
        few = sorted(name for name, rows in clients.items() if len(rows) < least)
        taken = {name: rows for name, rows in clients.items() if len(rows) >= least}
        if not taken:
            raise DataError(f"client {few[0]!r} has fewer rows than policy.least_rows={least}, and no other is left")
        self._sizes = dict(ClientRows(taken, folder))
        self.few = few
        """Clients that are left out."""
        self.sha256 = content_sha256({name: file_sha256(rows_file(folder, name)) for name in taken})

    def __getitem__(self, client_id: str) -> int:
        return self._sizes[client_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sizes)

    def __len__(self) -> int:
        return len(self._sizes)
