"""Records of one data file with their place in it, so that an error can name the broken one."""

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedproxy.errors import DataError, nearest


@dataclass(frozen=True)
class Record:
    """The values of one row, by column."""

    place: str
    """File and row in words, counted from 1: ``data/train.jsonl line 3``."""
    values: Mapping[str, Any]


def read_file(path: Path) -> Iterator[Record]:
    """Yield the records of a .jsonl, .json, .csv, .parquet or .txt file (one ``text`` per line that is not blank).

    Raises:
        DataError: If the file is of another kind, cannot be read, or a record is broken.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path} is of no known kind{nearest(path.suffix, _READERS)}; convert it to one of them")
    try:
        yield from reader(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}); check the file") from error


def _jsonl(path: Path) -> Iterator[Record]:
    for place, line in _lines(path):
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{place} is not valid JSON ({error.msg}, column {error.colno}); mend the line") from error
        yield _record(place, values)


def _json(path: Path) -> Iterator[Record]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} line {error.lineno} is not valid JSON ({error.msg}); mend the file") from error
    if not isinstance(rows, list):
        raise DataError(
            f"{path} must hold a JSON list of objects, got {type(rows).__name__}; one object a line is .jsonl"
        )
    for number, values in enumerate(rows, 1):
        yield _record(f"{path} row {number}", values)


def _csv(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        number = 0
        try:
            for number, values in enumerate(reader, 1):
                place = f"{path} row {number} (line {reader.line_num})"
                if None in values or None in values.values():
                    fields = sum(value is not None for name, value in values.items() if name is not None)
                    found = fields + len(values.get(None) or ())
                    raise DataError(f"{place} has {found} fields, the header has {len(reader.fieldnames or ())}")
                yield Record(place, values)
        except csv.Error as error:
            raise DataError(f"{path} row {number + 1} is not valid CSV ({error}); mend the row") from error


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    number += 1
                    yield Record(f"{path} row {number}", values)
    except pa.ArrowInvalid as error:
        raise DataError(f"{path} is no readable parquet file ({str(error).splitlines()[0]}); write it again") from error


def _txt(path: Path) -> Iterator[Record]:
    for place, line in _lines(path):
        yield Record(place, {"text": line.strip()})


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the lines that are not blank, with their place."""
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path} line {number}", line


def _record(place: str, values: Any) -> Record:
    if not isinstance(values, dict):
        raise DataError(f"{place} must be a JSON object, got {type(values).__name__}")
    return Record(place, values)


_READERS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet, ".txt": _txt}
SUFFIXES = tuple(_READERS)
"""Kinds of files that can be read."""
