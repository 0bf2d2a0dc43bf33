"""One row of a data file as it was read, and its values, with the place in every error."""

import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fedproxy.errors import DataError, nearest, one_line


@dataclass(frozen=True)
class Record:
    """The values of one row, by column."""

    place: str
    """File and row in words, counted from 1: ``data/train.jsonl line 3``."""
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Columns:
    """Names of the columns that hold a row's parts, where the recipe names them for all sources."""

    prompt: str = "prompt"
    target: str = "target"
    label: str | None = None
    """Column for partitions that skew labels: whole numbers or words, which mean the same in every source."""
    owner: str | None = None
    """Column that names the client whose row it is."""


def no_column(place: str, column: str, found: Iterable[object]) -> DataError:
    """Return the error of a row or a table that lacks a column."""
    return DataError(f"{place} has no column {column!r}{nearest(column, (one_line(name, 40) for name in found))}")


def value_of(record: Record, column: str) -> Any:
    """Return the value of a column.

    Raises:
        DataError: If the record has none.
    """
    if column not in record.values:
        raise no_column(record.place, column, record.values)
    return record.values[column]


def text_of(record: Record, column: str) -> str:
    """Return the text of a column, which is not blank.

    Raises:
        DataError: If there is none.
    """
    text = as_text(record.place, repr(column), value_of(record, column))
    if not text.strip():
        raise DataError(f"{record.place}: {column!r} is empty; fill it in or remove the row")
    return text


def optional_text(record: Record, column: str) -> str:
    """Return the text of a column, and no text where the column is not there, null or blank.

    Raises:
        DataError: If it holds anything else.
    """
    value = record.values.get(column)
    text = "" if value is None else as_text(record.place, repr(column), value)
    return text if text.strip() else ""


def as_text(place: str, what: str, value: Any) -> str:
    """Return a value that must be text of whole characters.

    Args:
        place: File and row in words.
        what: What the value is, in words.
        value: The value.

    Raises:
        DataError: If it is not.
    """
    if not isinstance(value, str):
        raise DataError(
            f"{place}: {what} must be text, got {type(value).__name__} {shown(value)}; put it into quotes or remove "
            "the row"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: {what} holds half a character (surrogate, at {error.start}); write the whole one"
        ) from None
    return value


def shown(value: Any) -> str:
    """Return a foreign value as it may be shown in an error."""
    return one_line(reprlib.repr(value), 40)
