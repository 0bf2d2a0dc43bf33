"""Training rows and plain texts from local files, save_to_disk folders, assets and the hub.

A path is, in this order: ``asset:NAME`` (or ``asset:NAME/file``), a local file (.jsonl, .json, .csv, .parquet, and .txt
for texts), a local folder (written by ``save_to_disk``, or holding ``<split>.jsonl`` and the like), or a hub id.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from fedproxy.data.assets import resolve
from fedproxy.data.loading import load_from_hub, load_saved
from fedproxy.data.readers import SUFFIXES, Record, read_file
from fedproxy.data.rows import Row
from fedproxy.errors import DataError, nearest
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
    rows = []
    labels: list[Any] = []
    for number, record in enumerate(islice(_records(path, split), limit)):
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
    return [Row(row.prompt, row.target, row.source, row.key, label) for row, label in zip(rows, numbers, strict=True)]


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

    texts = [_text(record, "text") for record in _records(path, "train")]
    if len(texts) < rows:
        raise DataError(f"{path} holds {len(texts)} texts, {rows} are asked for; ask for fewer or add some")
    order = torch.randperm(len(texts), generator=generator(seed, "texts"))[:rows]
    return [texts[index] for index in order.tolist()]


def count_texts(path: str) -> int:
    """Return how many texts :func:`read_texts` can draw from."""
    return sum(1 for _ in _records(path, "train"))


def _records(path: str, split: str) -> Iterator[Record]:
    """Yield every record of a path with its place in words."""
    local = resolve(path)
    if local is None:
        yield from _hub_records(path, split)
    elif local.is_file():
        yield from read_file(local)
    elif (local / "dataset_info.json").exists() or (local / "dataset_dict.json").exists():
        yield from _saved_records(local, split)
    else:
        yield from read_file(_split_file(local, split))


def _split_file(folder: Path, split: str) -> Path:
    for suffix in SUFFIXES:
        if (folder / f"{split}{suffix}").is_file():
            return folder / f"{split}{suffix}"
    held = {file.stem for file in folder.iterdir() if file.suffix in SUFFIXES}
    raise DataError(f"{folder} holds no data file for split {split!r}{nearest(split, held)}")


def _saved_records(folder: Path, split: str) -> Iterator[Record]:
    from datasets import Dataset

    data = load_saved(folder)
    if not isinstance(data, Dataset):
        if split not in data:
            raise DataError(f"{folder} holds no split {split!r}{nearest(split, data)}")
        data = data[split]
    for number, values in enumerate(data, 1):
        yield Record(f"{folder} row {number}", values)


def _hub_records(path: str, split: str) -> Iterator[Record]:
    if not _HUB_ID.fullmatch(path) or Path(path).suffix in SUFFIXES:
        raise DataError(f"{path} does not exist; give an existing file or folder, asset:NAME or a hub id")
    for number, values in enumerate(load_from_hub(path, split), 1):
        yield Record(f"{path} {split} row {number}", values)


def _text(record: Record, column: str) -> str:
    value = _value(record, column)
    if not isinstance(value, str):
        raise DataError(f"{record.place}: {column!r} must be text, got {type(value).__name__} {_short(value)}")
    if not value.strip():
        raise DataError(f"{record.place}: {column!r} is empty; fill it in or remove the row")
    return value


def _label(record: Record, column: str) -> int | str:
    value = _value(record, column)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise DataError(f"{record.place}: {column!r} must be a whole number or a word, got {_short(value)}")
    return value


def _value(record: Record, column: str) -> Any:
    if column not in record.values:
        raise DataError(f"{record.place} has no column {column!r}{nearest(column, map(str, record.values))}")
    return record.values[column]


def _numbered(labels: list[Any]) -> list[int]:
    """Return whole numbers as they are, and anything else as its position among the sorted words."""
    if all(isinstance(label, int) for label in labels):
        return labels
    position: Mapping[str, int] = {word: index for index, word in enumerate(sorted({str(label) for label in labels}))}
    return [position[str(label)] for label in labels]


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."
