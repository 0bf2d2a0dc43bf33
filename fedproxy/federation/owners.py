"""A partition file as it is read: which client owns which rows, by key."""

import json
from pathlib import Path
from typing import Any

from fedproxy.errors import DataError, one_line
from fedproxy.files import open_regular


def read_owners(path: Path, where: str, way_out: str) -> dict[str, list[str]]:
    """Return each client's entries, in the file's order.

    Args:
        path: JSON file, ``{"clients": {name: [entries]}}``.
        where: The file in words, which an error's message begins with.
        way_out: What to do about it, which the message ends with.

    Raises:
        DataError: If it cannot be read, or holds something else.
    """
    try:
        with open_regular(path, follow=True) as file:
            content = json.loads(file.read(), object_pairs_hook=_without_twins)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{where} cannot be read as JSON ({one_line(error)}); {way_out}") from error
    clients = content.get("clients") if isinstance(content, dict) else None
    if not isinstance(clients, dict) or not clients:
        raise DataError(f'{where} must hold {{"clients": {{name: [row keys]}}}} with at least one client; {way_out}')
    for client, entries in clients.items():
        if not (client and isinstance(entries, list) and all(isinstance(entry, str) for entry in entries)):
            raise DataError(
                f"{where}: client {client!r} must have a name and a list of row keys or source names; {way_out}"
            )
    return clients


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twin = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twin!r} stands twice in one object")
    return content
