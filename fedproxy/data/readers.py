"""Records of one data file with their place in it, so that an error can name the broken one."""

import csv
import gzip
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from io import BufferedIOBase, BufferedReader, RawIOBase, TextIOWrapper
from itertools import count
from pathlib import Path
from typing import Any

from fedproxy.data.records import Record
from fedproxy.errors import DataError, nearest, one_line
from fedproxy.files import MOST_JSON_BYTES, open_regular, parse_json, read_whole

LONGEST_TEXT = 1 << 26
"""Most characters of a line, and of a CSV field: 64 Mi, a shelf of books. Python's own limit for a field is 131,072."""
MOST_UNPACKED = 1 << 33
"""Most bytes that a .gz file may hold: 8 GiB of text."""
_PACKED = ".gz"


def read_file(path: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> Iterator[Record]:
    """Yield the records of a .jsonl, .json, .csv, .parquet or .txt file (one ``text`` per line that is not blank).

    All but parquet may be packed by gzip: ``.jsonl.gz``.

    Args:
        path: The file; a pipe or a device is refused.
        columns: The columns that are wanted; of a parquet file no others are read.
        optional: Columns that may be missing, and in tables may hold lists and structs.

    Raises:
        DataError: If the file is of another kind, cannot be read, or a record is broken.
    """
    kind = kind_of(path)
    reader = _READERS.get(kind)
    if kind == ".parquet":
        from fedproxy.data.tables import parquet_records as read
    elif reader is None:
        raise DataError(f"{path} is not of a known kind{nearest(kind, SUFFIXES)}; convert it to one of them")
    try:
        yield from read(path, columns, optional) if reader is None else reader(path, columns)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is not a whole gzip file ({one_line(error, 80)}); pack it again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or one_line(error)}); check the file") from error


def kind_of(path: Path) -> str:
    """Return a file's kind by the end of its name, ``.gz`` behind it left out, in lower case."""
    whole = path.suffix.lower()
    return Path(path.stem).suffix.lower() or whole if whole == _PACKED else whole


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
    if path.suffix.lower() == _PACKED:
        with _unpacked(path) as file:
            content = file.read(MOST_JSON_BYTES + 1)
        if len(content) > MOST_JSON_BYTES:
            raise DataError(f"{path} unpacks to more than {MOST_JSON_BYTES} bytes; write an object a line (.jsonl.gz)")
    else:
        content = read_whole(path)
    text = content.decode("utf-8-sig")
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
        if columns and len(header) == 1 and set(columns) <= set(header[0].split(mark)) - {header[0]}:
            raise DataError(f"{path} line 1 separates its columns by {mark!r}; save it with commas")


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
    packed = path.suffix.lower() == _PACKED
    file = _unpacked(path) if packed else open_regular(path, follow=True)
    return TextIOWrapper(file, encoding="utf-8-sig", newline=newline)


def _unpacked(path: Path) -> BufferedReader:
    return BufferedReader(_Bounded(path))


class _Bounded(RawIOBase):
    """What a gzip file holds, up to :data:`MOST_UNPACKED` bytes.

    Raises:
        DataError: When it is read further.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._packed, self._left = path, open_regular(path, follow=True), MOST_UNPACKED
        self._file: BufferedIOBase = gzip.GzipFile(fileobj=self._packed)

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as one read goes."""
        read = self._file.readinto1(buffer)
        self._left -= read
        if self._left < 0:
            raise DataError(f"{self._path} unpacks to more than {MOST_UNPACKED} bytes; break it into several files")
        return read

    def close(self) -> None:
        """Close the file."""
        self._packed.close()
        super().close()


_READERS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".txt": _txt}
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
"""Kinds of files that can be read."""
