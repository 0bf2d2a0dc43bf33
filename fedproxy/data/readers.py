"""Records of one data file with their place in it, so that an error can name the broken one."""

import csv
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from itertools import count
from pathlib import Path
from typing import Any

from fedproxy.errors import DataError, nearest, one_line
from fedproxy.files import open_regular, parse_json, read_whole

LONGEST_TEXT = 1 << 26
"""Most characters of a line, and of a CSV field: 64 Mi, a shelf of books. Python's own limit for a field is 131,072."""


@dataclass(frozen=True)
class Record:
    """The values of one row, by column."""

    place: str
    """File and row in words, counted from 1: ``data/train.jsonl line 3``."""
    values: Mapping[str, Any]


def read_file(path: Path, columns: Sequence[str]) -> Iterator[Record]:
    """Yield the records of a .jsonl, .json, .csv, .parquet or .txt file (one ``text`` per line that is not blank).

    Args:
        path: The file; a pipe or a device is refused.
        columns: The columns that are wanted; of a parquet file no others are read.

    Raises:
        DataError: If the file is of another kind, cannot be read, or a record is broken.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path} is not of a known kind{nearest(path.suffix, _READERS)}; convert it to one of them")
    try:
        yield from reader(path, columns)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or one_line(error)}); check the file") from error


def no_column(place: str, column: str, found: Iterable[object]) -> DataError:
    """Return the error of a row or a table that lacks a column."""
    return DataError(f"{place} has no column {column!r}{nearest(column, (one_line(name, 40) for name in found))}")


def check_columns(place: str, names: Iterable[str]) -> None:
    """Refuse a table with two columns of one name: which of them is meant nobody knows.

    Raises:
        DataError: Naming the column.
    """
    twins = [name for name, count in Counter(names).items() if count > 1 and name]
    if twins:
        raise DataError(f"{place} has two columns named {one_line(twins[0], 40)!r}; rename or remove one of them")


def _jsonl(path: Path, columns: Sequence[str]) -> Iterator[Record]:
    del columns
    for place, line in _filled_lines(path):
        try:
            values = parse_json(line, dict, unique_keys=True)
        except ValueError as error:
            raise DataError(f"{place}: {error}; write one JSON object in each line") from None
        yield Record(place, values)


def _json(path: Path, columns: Sequence[str]) -> Iterator[Record]:
    del columns
    text = read_whole(path).decode("utf-8-sig")
    try:
        rows = parse_json(text, list, unique_keys=True)
    except ValueError as error:
        raise DataError(f"{path}: {error}; write one JSON list of objects (.jsonl holds an object a line)") from None
    for number, values in enumerate(rows, 1):
        place = f"{path} row {number}"
        if not isinstance(values, dict):
            raise DataError(f"{place} must be a JSON object, got {type(values).__name__}; fix the row")
        yield Record(place, values)


def _csv(path: Path, columns: Sequence[str]) -> Iterator[Record]:
    csv.field_size_limit(LONGEST_TEXT)
    with _open(path, newline="") as file:
        reader = csv.DictReader((line for _, line in _lines(path, file)), strict=True)
        number = 0
        try:
            check_columns(f"{path} line 1", reader.fieldnames or ())
            _check_commas(path, reader.fieldnames or (), columns)
            for number, values in enumerate(reader, 1):
                place = f"{path} row {number} (line {reader.line_num})"
                if None in values or None in values.values():
                    fields = sum(value is not None for name, value in values.items() if name is not None)
                    found, wanted = fields + len(values.get(None) or ()), len(reader.fieldnames or ())
                    raise DataError(f"{place} has {found} fields, the header has {wanted}; put fields into quotes")
                yield Record(place, values)
        except csv.Error as error:
            raise DataError(f"{path} row {number + 1} is not valid CSV ({error}); fix the row") from error


def _check_commas(path: Path, header: Sequence[str], columns: Sequence[str]) -> None:
    """Refuse a header that holds the wanted columns between other marks: spreadsheets of many countries write those.

    Raises:
        DataError: Naming the mark.
    """
    for mark in (";", "\t", "|"):
        if len(header) == 1 and set(columns) <= set(header[0].split(mark)) - {header[0]}:
            raise DataError(f"{path} line 1 separates its columns by {mark!r}; save it with commas")


def _parquet(path: Path, columns: Sequence[str]) -> Iterator[Record]:
    from fedproxy.data.tables import parquet_records

    return parquet_records(path, columns)


def _txt(path: Path, columns: Sequence[str]) -> Iterator[Record]:
    del columns
    for place, line in _filled_lines(path):
        yield Record(place, {"text": line.strip()})


def _filled_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the lines that are not blank, with their place."""
    with _open(path) as file:
        yield from ((place, line) for place, line in _lines(path, file) if line.strip())


def _lines(path: Path, file: TextIOWrapper) -> Iterator[tuple[str, str]]:
    """Yield all lines, with their place, of which none is longer than a text may be."""
    for number in count(1):
        line = file.readline(LONGEST_TEXT + 1)
        if not line:
            return
        if len(line) > LONGEST_TEXT:
            raise DataError(f"{path} line {number} has more than {LONGEST_TEXT} characters; break it into several rows")
        yield f"{path} line {number}", line


def _open(path: Path, newline: str | None = None) -> TextIOWrapper:
    return TextIOWrapper(open_regular(path, follow=True), encoding="utf-8-sig", newline=newline)


_READERS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet, ".txt": _txt}
SUFFIXES = tuple(_READERS)
"""Kinds of files that can be read."""
