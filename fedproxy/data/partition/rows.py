"""Every client's rows in a file of its own: written where they are dealt out, read by that client alone."""

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import Field, fields
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from fedproxy.data.owned_texts import OwnedTexts
from fedproxy.data.rows import Row
from fedproxy.errors import DataError, one_line
from fedproxy.files import open_regular, parse_json, private_folder, write_text
from fedproxy.names import file_stem

_WRITERS = 16
_FIRST = ("prompt", "target", "source", "key", "label", "ends")


def rows_file(folder: Path, client_id: str) -> Path:
    """Return where a client's rows lie; see :func:`fedproxy.names.file_stem`."""
    return folder / f"{file_stem(client_id)}.jsonl"


def held_out_file(folder: Path, client_id: str) -> Path:
    """Return where a client's held-out rows lie, if it has any."""
    return folder / f"{file_stem(client_id)}.held_out.jsonl"


def read_client_rows(folder: Path, client_id: str, *, held_out: bool = False) -> list[Row]:
    """Read one client's rows, from its own file alone.

    Args:
        folder: The folder of all clients' rows.
        client_id: The client.
        held_out: Read the rows that it does not train on, of which there may be none.

    Raises:
        DataError: If the file is missing or damaged.
    """
    path = held_out_file(folder, client_id) if held_out else rows_file(folder, client_id)
    if held_out and not path.exists():
        return []
    try:
        with TextIOWrapper(open_regular(path), encoding="utf-8") as file:
            return [_row(parse_json(line, dict)) for line in file]
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"{path} with the rows of client {client_id!r} cannot be read ({one_line(error, 80)}); "
            "resume=auto writes it again"
        ) from error


def _row(values: dict[str, Any]) -> Row:
    for name in ("messages", "tools"):
        if name in values:
            values[name] = tuple(values[name])
    return Row(**values)


def _line(row: Row) -> str:
    """Return a row as JSON; of its later fields only those that say something, so that older rows keep their bytes."""
    told = {
        item.name: getattr(row, item.name) for item in fields(row) if item.name in _FIRST or not _is_default(item, row)
    }
    return json.dumps(told, ensure_ascii=False) + "\n"


def _write(folder: Path, client_id: str, rows: Sequence[Row]) -> None:
    """Write a client's rows, and those that it does not train on to a file of their own."""
    write_text(rows_file(folder, client_id), "".join(_line(row) for row in rows if not row.held_out))
    if any(row.held_out for row in rows):
        write_text(held_out_file(folder, client_id), "".join(_line(row) for row in rows if row.held_out))


def _is_default(item: Field[Any], row: Row) -> bool:
    return bool(getattr(row, item.name) == item.default)


class ClientRows(Mapping[str, int]):
    """Clients' rows, written to disk and not read again here: names with numbers of rows, and a hash of every row.

    Args:
        clients: Each client's rows, held-out ones among them; they are written out and not kept.
        folder: Where the files lie, one per client, and one for its held-out rows where it has any.
        examples: Examples that each client trains on in an epoch; None is one for each of its rows.

    Raises:
        CheckpointError: If a file cannot be written.
    """

    def __init__(
        self, clients: Mapping[str, Sequence[Row]], folder: Path, examples: Mapping[str, int] | None = None
    ) -> None:
        counted = examples or {
            name: sum(row.copies for row in rows if not row.held_out) for name, rows in clients.items()
        }
        self._sizes = {name: counted[name] for name in clients}
        self._folder: Path | None = folder
        self.converse = any(row.messages for rows in clients.values() for row in rows)
        """Whether there are conversations, which a chat template frames."""
        self.has_texts = any(row.is_text for rows in clients.values() for row in rows)
        """Whether there are texts without a prompt."""
        self.owned = OwnedTexts(row for rows in clients.values() for row in rows)
        """Tells whether a text is a client's."""
        private_folder(folder)
        with ThreadPoolExecutor(_WRITERS) as writers:  # each waits for the disk
            list(writers.map(lambda name: _write(folder, name, clients[name]), clients))

    def held_out(self, client_id: str) -> list[Row]:
        """Read the rows that a client does not train on; it is the client who scores models on them.

        Raises:
            DataError: If its file is damaged.
        """
        return [] if self._folder is None else read_client_rows(self._folder, client_id, held_out=True)

    @classmethod
    def elsewhere(cls, sizes: Mapping[str, int], *, converse: bool = False) -> "ClientRows":
        """Return clients whose rows lie at real sites: names, numbers of rows and this word are all that is known."""
        rows = cls.__new__(cls)
        rows._sizes, rows._folder, rows.owned = dict(sizes), None, OwnedTexts(())
        rows.converse, rows.has_texts = converse, False
        return rows

    def __getitem__(self, client_id: str) -> int:
        """Return how many rows a client has."""
        return self._sizes[client_id]

    def __iter__(self) -> Iterator[str]:
        """Yield the clients' names."""
        return iter(self._sizes)

    def __len__(self) -> int:
        """Return the number of clients."""
        return len(self._sizes)
