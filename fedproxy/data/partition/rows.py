"""Every client's rows in a file of its own: written where they are dealt out, read by that client alone."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from io import TextIOWrapper
from pathlib import Path

from fedproxy.data.owned_texts import OwnedTexts
from fedproxy.data.rows import Row
from fedproxy.errors import DataError, one_line
from fedproxy.files import open_regular, parse_json, private_folder, write_text
from fedproxy.names import file_stem


def rows_file(folder: Path, client_id: str) -> Path:
    """Return where a client's rows lie; see :func:`fedproxy.names.file_stem`."""
    return folder / f"{file_stem(client_id)}.jsonl"


def read_client_rows(folder: Path, client_id: str) -> list[Row]:
    """Read one client's rows, from its own file alone.

    Raises:
        DataError: If the file is missing or damaged.
    """
    path = rows_file(folder, client_id)
    try:
        with TextIOWrapper(open_regular(path), encoding="utf-8") as file:
            return [Row(**parse_json(line, dict)) for line in file]
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"{path} with the rows of client {client_id!r} cannot be read ({one_line(error, 80)}); "
            "resume=auto writes it again"
        ) from error


class ClientRows(Mapping[str, int]):
    """Clients' rows, written to disk and not read again here: names with numbers of rows, and a hash of every row.

    Args:
        clients: Each client's rows; they are written out and not kept.
        folder: Where the files lie, one per client.

    Raises:
        CheckpointError: If a file cannot be written.
    """

    def __init__(self, clients: Mapping[str, Sequence[Row]], folder: Path) -> None:
        self._sizes = {name: len(rows) for name, rows in clients.items()}
        self.owned = OwnedTexts(row for rows in clients.values() for row in rows)
        """Tells whether a text is a client's."""
        private_folder(folder)
        for name, rows in clients.items():
            lines = (json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)
            write_text(rows_file(folder, name), "".join(lines))

    @classmethod
    def elsewhere(cls, sizes: Mapping[str, int]) -> "ClientRows":
        """Return clients whose rows lie at real sites: names and numbers of rows are all that is known of them."""
        rows = cls.__new__(cls)
        rows._sizes, rows.owned = dict(sizes), OwnedTexts(())
        return rows

    def __getitem__(self, client_id: str) -> int:
        return self._sizes[client_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sizes)

    def __len__(self) -> int:
        return len(self._sizes)
