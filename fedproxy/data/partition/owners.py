"""A partition file as it is read: which client owns which rows, by key."""

from pathlib import Path

from fedproxy.errors import DataError, one_line
from fedproxy.files import parse_json, read_whole
from fedproxy.names import check_names


def read_owners(path: Path, where: str, way_out: str) -> dict[str, list[str]]:
    """Return each client's entries, in the file's order.

    Args:
        path: JSON file, ``{"clients": {name: [entries]}}``.
        where: The file in words, which an error's message begins with.
        way_out: What to do about it, which the message ends with.

    Raises:
        ConfigError: If a client's name is not good (:mod:`fedproxy.names`).
        DataError: If it cannot be read, or holds something else.
    """
    try:
        content = parse_json(read_whole(path).decode("utf-8-sig"), dict, unique_keys=True)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error, 120)
        raise DataError(f"{where} cannot be read as JSON ({reason}); {way_out}") from error
    clients = content.get("clients")
    if not isinstance(clients, dict) or not clients:
        raise DataError(f'{where} must hold {{"clients": {{name: [row keys]}}}} with at least one client; {way_out}')
    check_names(clients, where)
    for client, entries in clients.items():
        if not (isinstance(entries, list) and all(isinstance(entry, str) for entry in entries)):
            raise DataError(f"{where}: client {client!r} must have a list of row keys or source names; {way_out}")
    return clients
