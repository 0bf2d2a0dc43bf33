"""Training rows and plain texts from local files, save_to_disk folders, assets and the hub.

A path is, in this order: ``asset:NAME`` (or ``asset:NAME/file``), a local file (.jsonl, .json, .csv, .parquet, and .txt
for texts), a local folder (written by ``save_to_disk``, or holding ``<split>.jsonl`` and the like), or a hub id.
"""

import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from fedproxy.data.assets import resolve
from fedproxy.data.loading import load_from_hub
from fedproxy.data.readers import SUFFIXES, Record, no_column, read_file
from fedproxy.data.rows import Row
from fedproxy.data.tables import hub_records, is_saved, saved_records
from fedproxy.errors import DataError, nearest, one_line
from fedproxy.seeding import generator

_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


@dataclass(frozen=True)
class Columns:
    """Names of the columns that hold a row's parts."""

    prompt: str = "prompt"
    target: str = "target"
    label: str | None = None
    """Column for partitions that skew labels: whole numbers, or words that are numbered in sorted order."""


def read_rows(
    name: str, path: str, *, columns: Columns | None = None, split: str = "train", limit: int | None = None
) -> list[Row]:
    """Read training rows.

    The target is what the model should write right after the prompt, so it must carry its delimiter: where neither the
    prompt ends nor the target begins with whitespace, one blank is put in front of the target.

    Args:
        name: Name of the data set; every row's key is ``name/split/number``, counted from 0.
        path: Asset, file, folder or hub id, see the module.
        columns: Names of the prompt and target columns.
        split: Which split of a folder, an asset or a hub data set; part of the rows' keys in any case.
        limit: Read only this many rows, the first ones.

    Raises:
        DataError: If the file is missing, empty or of an unknown kind, or a row is broken; the message names the row.
        AssetError: If an asset is unknown or cannot be fetched.
    """
    columns = columns or Columns()
    wanted = tuple(column for column in (columns.prompt, columns.target, columns.label) if column is not None)
    rows = []
    labels: list[Any] = []
    for number, record in enumerate(islice(_records(path, split, wanted), limit)):
        prompt, target = _text(record, columns.prompt), _text(record, columns.target)
        if not (prompt[-1].isspace() or target[0].isspace()):
            target = f" {target}"
        rows.append(Row(prompt, target, source=name, key=f"{name}/{split}/{number}"))
        if columns.label is not None:
            labels.append(_label(record, columns.label))
    if not rows:
        raise DataError(f"{path} holds no rows (data set {name!r}, split {split!r}); give a file with at least one")
    if not labels:
        return rows
    numbers = _numbered(labels)
    return [replace(row, label=label) for row, label in zip(rows, numbers, strict=True)]


def read_texts(path: str, rows: int, seed: int) -> list[str]:
    """Read plain texts for calibration or distillation: ``rows`` of them, drawn by seed without replacement.

    Args:
        path: Asset, file, folder (its train split) or hub id with a ``text`` column, or a .txt file, one text a line.
        rows: How many texts.
        seed: Seed of the draw; the same seed gives the same texts in the same order.

    Raises:
        DataError: If there are fewer texts than asked for, or as for :func:`read_rows`.
        AssetError: If an asset is unknown or cannot be fetched.
    """
    import torch

    texts = [_text(record, "text") for record in _records(path, "train", ("text",))]
    if len(texts) < rows:
        raise DataError(f"{path} holds {len(texts)} texts, {rows} are asked for; ask for fewer or add some")
    order = torch.randperm(len(texts), generator=generator(seed, "texts"))[:rows]
    return [texts[index] for index in order.tolist()]


def count_texts(path: str) -> int:
    """Return how many texts :func:`read_texts` can draw from."""
    return sum(1 for _ in _records(path, "train", ("text",)))


def _records(path: str, split: str, columns: Sequence[str]) -> Iterator[Record]:
    """Yield every record of a path with its place in words; ``columns`` are those that are looked at."""
    if not path.strip():
        raise DataError("a path of data is empty; give a file or folder, asset:NAME or a hub id")
    local = resolve(path)
    if local is None:
        yield from _hub_records(path, split, columns)
    elif not local.is_dir():
        yield from read_file(local, columns)
    elif is_saved(local):
        yield from saved_records(local, split, columns)
    else:
        yield from read_file(_split_file(local, split), columns)


def _split_file(folder: Path, split: str) -> Path:
    try:
        held = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror}); check the folder") from error
    for suffix in SUFFIXES:
        for file in held:
            if file.stem == split and file.suffix.lower() == suffix:
                return file
    raise DataError(f"{folder} holds no data file for split {split!r}{nearest(split, {file.stem for file in held})}")


def _hub_records(path: str, split: str, columns: Sequence[str]) -> Iterator[Record]:
    if not _HUB_ID.fullmatch(path) or Path(path).suffix in SUFFIXES or _is_format(path):
        raise DataError(f"{path} does not exist; give an existing file or folder, asset:NAME or a hub id")
    yield from hub_records(load_from_hub(path, split), f"{path} {split}", columns)


def _is_format(path: str) -> bool:
    """Tell whether ``datasets`` takes a name for a kind of files, and would read all such files that lie here."""
    return path.isidentifier() and find_spec(f"datasets.packaged_modules.{path}") is not None


def _text(record: Record, column: str) -> str:
    value = _value(record, column)
    if not isinstance(value, str):
        raise DataError(
            f"{record.place}: {column!r} must be text, got {type(value).__name__} {_short(value)}; put it into quotes "
            "or remove the row"
        )
    if not value.strip():
        raise DataError(f"{record.place}: {column!r} is empty; fill it in or remove the row")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{record.place}: {column!r} holds half a character (surrogate, at {error.start}); write the whole one"
        ) from None
    return value


def _label(record: Record, column: str) -> int | str:
    value = _value(record, column)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise DataError(
            f"{record.place}: {column!r} must be a whole number or a word, got {_short(value)}; correct it or remove "
            "the row"
        )
    return value


def _value(record: Record, column: str) -> Any:
    if column not in record.values:
        raise no_column(record.place, column, record.values)
    return record.values[column]


def _numbered(labels: list[Any]) -> list[int]:
    """Return whole numbers as they are, and anything else as its position among the sorted words."""
    if all(isinstance(label, int) for label in labels):
        return labels
    position: Mapping[str, int] = {word: index for index, word in enumerate(sorted({str(label) for label in labels}))}
    return [position[str(label)] for label in labels]


def _short(value: Any) -> str:
    return one_line(reprlib.repr(value), 40)
