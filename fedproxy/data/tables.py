"""Records of Arrow tables: parquet files, folders of save_to_disk and data sets of the hub.

Only the wanted columns are read, and only text and numbers, or lists and structs of them: nothing decodes an image or a
sound, and no path or address that stands in a table is opened.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedproxy.data.readers import check_columns
from fedproxy.data.records import Record, no_column
from fedproxy.errors import DataError, nearest, one_line
from fedproxy.files import open_regular, read_json

_ROWS = 1024
"""Rows that are turned into records at once."""
_SAVE_AGAIN = "save the data set again with save_to_disk"


def parquet_records(path: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> Iterator[Record]:
    """Yield the records of a parquet file.

    Args:
        path: The file.
        columns: The columns that are wanted, of text or numbers.
        optional: Columns that may be missing, and may hold lists and structs of text and numbers.

    Raises:
        DataError: If it is damaged, lacks a column, or a column holds anything else.
        OSError: If it is not a regular file.
    """
    import pyarrow.parquet as pq

    with open_regular(path, follow=True) as file, _reading(path, "a readable parquet file", "write it again"):
        table = pq.ParquetFile(file)
        wanted = _wanted(str(path), table.schema_arrow, columns, optional)
        yield from _records(str(path), table.iter_batches(batch_size=_ROWS, columns=wanted))


def is_saved(folder: Path) -> bool:
    """Tell whether a folder was written by ``save_to_disk``."""
    return any((folder / name).exists() for name in ("dataset_dict.json", "dataset_info.json", "state.json"))


def saved_records(folder: Path, split: str, columns: Sequence[str], optional: Sequence[str] = ()) -> Iterator[Record]:
    """Yield the records of a folder that ``save_to_disk`` wrote; of several splits, those of one.

    Args:
        folder: The folder.
        split: Name of the split.
        columns: As for :func:`parquet_records`.
        optional: As for :func:`parquet_records`.

    Raises:
        DataError: If it is not whole, has no such split, lacks a column, or a column holds anything else.
    """
    whole = saved_split(folder, split)
    with _reading(folder, "a whole save_to_disk folder", _SAVE_AGAIN):
        yield from _records(str(folder), _saved_batches(whole, str(folder), columns, optional))


def saved_split(folder: Path, split: str) -> Path:
    """Return where a split lies of what ``save_to_disk`` wrote: in the folder itself where there is but one.

    Raises:
        DataError: If there is no such split.
    """
    if (folder / "dataset_dict.json").exists():
        splits = read_json(folder / "dataset_dict.json", dict, error=DataError, remedy=_SAVE_AGAIN).get("splits")
        names = [name for name in splits if isinstance(name, str)] if isinstance(splits, list) else []
        if split not in names:
            raise DataError(f"{folder} holds no split {split!r}{nearest(split, names)}")
        return folder / split
    return folder


def _saved_batches(folder: Path, place: str, columns: Sequence[str], optional: Sequence[str]) -> Iterator[Any]:
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
            wanted = _wanted(place, stream.schema, columns, optional)
            for batch in stream:
                yield batch.select(wanted)


def hub_records(data: Any, place: str, columns: Sequence[str], optional: Sequence[str] = ()) -> Iterator[Record]:
    """Yield the records of a data set that ``datasets`` loaded.

    Args:
        data: A ``datasets.Dataset``.
        place: What it is called in errors.
        columns: As for :func:`parquet_records`.
        optional: As for :func:`parquet_records`.

    Raises:
        DataError: If a column is missing or of another kind, or what is cached of the set is damaged.
    """
    with _reading(place, "a whole data set", "delete its copy in the hub's cache"):
        wanted = _wanted(place, data.features.arrow_schema, columns, optional)
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


def _wanted(place: str, schema: Any, columns: Sequence[str], optional: Sequence[str]) -> list[str]:
    """Return the wanted columns of a schema, each of them text or numbers, or lists and structs of these."""
    check_columns(place, schema.names)
    there = [name for name in optional if name in schema.names and name not in columns]
    if not (there or columns):
        raise no_column(place, optional[0], schema.names)
    for column in columns:
        if column not in schema.names:
            raise no_column(place, column, schema.names)
        kind = schema.field(column).type
        if not _is_plain(kind):
            raise DataError(
                f"{place}: column {column!r} must hold text or numbers, got {one_line(kind, 60)}; name another column"
            )
    for name in there:
        if not _is_nested(schema.field(name).type):
            raise DataError(
                f"{place}: column {name!r} must hold text or numbers, or lists and structs of them, got "
                f"{one_line(schema.field(name).type, 60)}; name another column"
            )
    return [*dict.fromkeys(columns), *there]


def _is_nested(kind: Any) -> bool:
    """Return whether a type is plain, or a list or a struct of such types at any depth."""
    from pyarrow import types

    if any(check(kind) for check in (types.is_list, types.is_large_list, types.is_fixed_size_list)):
        return _is_nested(kind.value_type)
    if types.is_struct(kind):
        return all(_is_nested(kind.field(index).type) for index in range(kind.num_fields))
    return _is_plain(kind)


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
                yield Record(f"{place} row {number}", {name: _filled(value) for name, value in values.items()})


def _filled(value: Any) -> Any:
    """Return a value without the nulls by which a struct stands in for what a row does not have."""
    if isinstance(value, dict):
        return {key: _filled(item) for key, item in value.items() if item is not None}
    return [_filled(item) for item in value] if isinstance(value, list) else value
