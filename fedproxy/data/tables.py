"""Records of Arrow tables: parquet files, folders of save_to_disk and data sets of the hub.

Only the wanted columns are read, and only text and numbers: nothing decodes an image or a sound, and no path or address
that stands in a table is opened.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedproxy.data.readers import Record, check_columns, no_column
from fedproxy.errors import DataError, nearest, one_line
from fedproxy.files import open_regular, read_json

_ROWS = 1024
"""Rows that are turned into records at once."""
_SAVE_AGAIN = "save the data set again with save_to_disk"


def parquet_records(path: Path, columns: Sequence[str]) -> Iterator[Record]:
    """Yield the records of a parquet file.

    Raises:
        DataError: If it is damaged, lacks a column, or a column holds neither text nor numbers.
        OSError: If it is not a regular file.
    """
    import pyarrow.parquet as pq

    with open_regular(path, follow=True) as file, _reading(path, "a readable parquet file", "write it again"):
        table = pq.ParquetFile(file)
        wanted = _wanted(str(path), table.schema_arrow, columns)
        yield from _records(str(path), table.iter_batches(batch_size=_ROWS, columns=wanted))


def is_saved(folder: Path) -> bool:
    """Tell whether a folder was written by ``save_to_disk``."""
    return any((folder / name).exists() for name in ("dataset_dict.json", "dataset_info.json", "state.json"))


def saved_records(folder: Path, split: str, columns: Sequence[str]) -> Iterator[Record]:
    """Yield the records of a folder that ``save_to_disk`` wrote; of several splits, those of one.

    Raises:
        DataError: If it is not whole, has no such split, lacks a column, or a column holds neither text nor numbers.
    """
    whole = folder
    if (folder / "dataset_dict.json").exists():
        splits = read_json(folder / "dataset_dict.json", dict, error=DataError, remedy=_SAVE_AGAIN).get("splits")
        names = [name for name in splits if isinstance(name, str)] if isinstance(splits, list) else []
        if split not in names:
            raise DataError(f"{folder} holds no split {split!r}{nearest(split, names)}")
        whole = folder / split
    with _reading(folder, "a whole save_to_disk folder", _SAVE_AGAIN):
        yield from _records(str(folder), _saved_batches(whole, str(folder), columns))


def _saved_batches(folder: Path, place: str, columns: Sequence[str]) -> Iterator[Any]:
    """Yield the record batches of one saved split, from the Arrow streams that lie in its folder."""
    import pyarrow as pa

    state = read_json(folder / "state.json", dict, error=DataError, remedy=_SAVE_AGAIN)
    if state.get("_indices_data_files"):
        raise ValueError("its rows are picked by a list of numbers")
    files = state.get("_data_files")
    if not isinstance(files, list) or not all(isinstance(entry, dict) for entry in files):
        raise ValueError("its state.json does not list its files")
    for name in [entry.get("filename") for entry in files]:
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError("it names a file outside of the folder")
        with open_regular(folder / name, follow=True) as file, pa.ipc.open_stream(file) as stream:
            wanted = _wanted(place, stream.schema, columns)
            for batch in stream:
                yield batch.select(wanted)


def hub_records(data: Any, place: str, columns: Sequence[str]) -> Iterator[Record]:
    """Yield the records of a data set that ``datasets`` loaded.

    Args:
        data: A ``datasets.Dataset``.
        place: What it is called in errors.
        columns: The columns that are wanted.

    Raises:
        DataError: If a column is missing, or holds neither text nor numbers, or what is cached of the set is damaged.
    """
    with _reading(place, "a whole data set", "delete its copy in the hub's cache"):
        wanted = _wanted(place, data.features.arrow_schema, columns)
        tables = data.select_columns(wanted).with_format("arrow").iter(batch_size=_ROWS)
        yield from _records(place, (batch for table in tables for batch in table.to_batches()))


@contextmanager
def _reading(place: object, kind: str, remedy: str) -> Iterator[None]:
    """Make one line of what Arrow raises: its errors are of many kinds, and all of them mean damage."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or one_line(error, 120)
        raise DataError(f"{place} is not {kind} ({reason}); {remedy}") from error


def _wanted(place: str, schema: Any, columns: Sequence[str]) -> list[str]:
    """Return the wanted columns of a schema, each of them text or numbers."""
    check_columns(place, schema.names)
    for column in columns:
        if column not in schema.names:
            raise no_column(place, column, schema.names)
        kind = schema.field(column).type
        if not _is_plain(kind):
            raise DataError(
                f"{place}: column {column!r} must hold text or numbers, got {one_line(kind, 60)}; name another column"
            )
    return list(dict.fromkeys(columns))


def _is_plain(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    plain = (types.is_string, types.is_large_string, types.is_string_view, types.is_integer, types.is_floating)
    return any(check(kind) for check in (*plain, types.is_boolean, types.is_null))


def _records(place: str, batches: Iterable[Any]) -> Iterator[Record]:
    """Yield the rows of Arrow record batches, counted from 1."""
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, _ROWS):
            for values in batch.slice(start, _ROWS).to_pylist():
                number += 1
                yield Record(f"{place} row {number}", values)
