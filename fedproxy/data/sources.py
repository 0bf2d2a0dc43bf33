"""Training rows and plain texts from local files, save_to_disk folders, assets and the hub.

A path is, in this order: ``asset:NAME`` (or ``asset:NAME/file``), a local file (.jsonl, .json, .csv, .parquet, and .txt
for texts, packed by gzip or not), a local folder (written by ``save_to_disk``, or holding ``<split>.jsonl`` and the
like), a pattern of such files and folders (``data/ward_*.jsonl``), or a hub id.
"""

import glob
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

from fedproxy.data.assets import resolve
from fedproxy.data.formats import DataFormat
from fedproxy.data.formats.prompt_target import PromptTarget
from fedproxy.data.loading import load_from_hub
from fedproxy.data.readers import SUFFIXES, kind_of, read_file
from fedproxy.data.records import Columns, Record, shown, text_of, value_of
from fedproxy.data.rows import Row
from fedproxy.data.tables import hub_records, is_saved, saved_records, saved_split
from fedproxy.errors import DataError, nearest
from fedproxy.files import at_home
from fedproxy.seeding import generator

_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


@dataclass(frozen=True)
class Source:
    """What a source was read as."""

    rows: list[Row]
    form: str
    """Name of the format that its rows have."""


def read_rows(
    name: str,
    path: str,
    *,
    columns: Columns | None = None,
    form: DataFormat | None = None,
    split: str = "train",
    limit: int | None = None,
) -> list[Row]:
    """Return the rows of a source; see :func:`read_source`."""
    return read_source(name, path, columns=columns, form=form, split=split, limit=limit).rows


def read_source(
    name: str,
    path: str,
    *,
    columns: Columns | None = None,
    form: DataFormat | None = None,
    split: str = "train",
    limit: int | None = None,
) -> Source:
    """Read training rows.

    Args:
        name: Name of the data set; every row's key is ``name/split/number``, counted from 0.
        path: Asset, file, folder, pattern or hub id, see the module.
        columns: Names of the columns that the recipe sets for all sources.
        form: What a record says; None is a prompt and its target. The target is what the model should write right
            after the prompt, so it must carry its delimiter: where neither the prompt ends nor the target begins with
            whitespace, one blank is put in front of the target.
        split: Which split of a folder, an asset or a hub data set; part of the rows' keys in any case.
        limit: Read only this many rows, the first ones.

    Raises:
        DataError: If the file is missing, empty or of an unknown kind, or a row is broken; the message names the row.
        AssetError: If an asset is unknown or cannot be fetched.
    """
    columns, chosen = columns or Columns(), form or PromptTarget()
    named = tuple(column for column in (columns.label, columns.owner) if column is not None)
    required, optional = (*chosen.required(columns), *named), chosen.optional(columns)
    rows: list[Row] = []
    for number, record in enumerate(islice(_records(path, split, required, optional), limit)):
        if not rows:
            chosen = chosen.settled(record, columns)
        row = chosen.row(record, columns, source=name, key=f"{name}/{split}/{number}")
        if columns.label is not None:
            row = replace(row, label=_word_or_number(record, columns.label))
        if columns.owner is not None:
            row = replace(row, owner=str(_word_or_number(record, columns.owner)))
        rows.append(row)
    if not rows:
        raise DataError(f"{path} holds no rows (data set {name!r}, split {split!r}); give a file with at least one")
    return Source(rows, chosen.name)


def owners_in(path: str, column: str, *, split: str = "train") -> set[str]:
    """Return the clients that a column of a source names.

    Raises:
        DataError: As for :func:`read_source`.
        AssetError: As for :func:`read_source`.
    """
    return set(_owners(path, column, split, _stamp(path, split)))


@lru_cache(maxsize=256)
def _owners(path: str, column: str, split: str, stamp: tuple[object, ...]) -> frozenset[str]:
    """Read the clients; ``stamp`` makes a changed file a new entry, as they are asked for many times in a run."""
    return frozenset(str(_word_or_number(record, column)) for record in _records(path, split, (column,)))


def _stamp(path: str, split: str) -> tuple[object, ...]:
    """Return the files of a source with their sizes and times of writing; nothing of a hub id."""
    places = sorted(place for place in files_of(path, split=split) if place.exists())
    files = [file for place in places for file in (sorted(place.iterdir()) if place.is_dir() else [place])]
    return tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)


def files_of(path: str, *, split: str = "train") -> set[Path]:
    """Return the real files and folders of save_to_disk that a source is read from, whatever way it is named.

    Of a hub id, which has none here, the id itself.

    Raises:
        DataError: As for :func:`read_source`.
        AssetError: As for :func:`read_source`.
    """
    return {_read_place(place, split).resolve() for place in _places(path)} or {Path(path)}


def _places(path: str) -> list[Path]:
    """Return the local files and folders that a path names; none of a hub id."""
    if not path.strip():
        raise DataError("a path of data is empty; give a file or folder, asset:NAME or a hub id")
    local = resolve(path)
    if local is not None:
        return [local]
    return _matching(path) if glob.has_magic(path) else []


def _read_place(local: Path, split: str) -> Path:
    if not local.is_dir():
        return local
    return saved_split(local, split) if is_saved(local) else _split_file(local, split)


def ending(rows: Sequence[Row], end_token: str = "auto") -> list[Row]:
    """Return the rows of a file with what ``data.end_token`` says of their ends; ``auto`` is its default."""
    return [replace(row, ends=end_token == "always" or (end_token == "auto" and not row.messages)) for row in rows]


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

    texts = [text_of(record, "text") for record in _records(path, "train", ("text",))]
    if len(texts) < rows:
        raise DataError(f"{path} holds {len(texts)} texts, {rows} are asked for; ask for fewer or add some")
    order = torch.randperm(len(texts), generator=generator(seed, "texts"))[:rows]
    return [texts[index] for index in order.tolist()]


def count_texts(path: str) -> int:
    """Return how many texts :func:`read_texts` can draw from."""
    return sum(1 for _ in _records(path, "train", ("text",)))


def _records(path: str, split: str, columns: Sequence[str], optional: Sequence[str] = ()) -> Iterator[Record]:
    """Yield every record of a path with its place in words; ``columns`` and ``optional`` are those looked at."""
    places = _places(path)
    seen: set[Path] = set()
    for place in places:
        real = _read_place(place, split).resolve()
        if real not in seen:  # a pattern may find a folder and the file in it, or a link to it
            seen.add(real)
            yield from _local_records(place, split, columns, optional)
    if not places:
        yield from _hub_records(path, split, columns, optional)


def _local_records(local: Path, split: str, columns: Sequence[str], optional: Sequence[str]) -> Iterator[Record]:
    if local.is_dir() and is_saved(local):
        yield from saved_records(local, split, columns, optional)
    else:
        yield from read_file(_read_place(local, split), columns, optional)


def _matching(pattern: str) -> list[Path]:
    """Return the files and folders of a pattern, in the order of their names."""
    found = sorted(Path(path) for path in glob.glob(str(at_home(pattern)), recursive=True))
    if not found:
        raise DataError(f"{pattern}: no file or folder has such a name; correct the pattern")
    return found


def _split_file(folder: Path, split: str) -> Path:
    try:
        held = sorted(file for file in folder.iterdir() if kind_of(file) in SUFFIXES)
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror}); check the folder") from error
    for suffix in SUFFIXES:
        for file in held:
            if _stem(file) == split and kind_of(file) == suffix:
                return file
    raise DataError(f"{folder} holds no data file for split {split!r}{nearest(split, {_stem(file) for file in held})}")


def _stem(file: Path) -> str:
    return Path(file.stem).stem if file.suffix.lower() == ".gz" else file.stem


def _hub_records(path: str, split: str, columns: Sequence[str], optional: Sequence[str]) -> Iterator[Record]:
    if not _HUB_ID.fullmatch(path) or kind_of(Path(path)) in SUFFIXES or _is_format(path):
        raise DataError(f"{path} does not exist; give an existing file or folder, asset:NAME or a hub id")
    yield from hub_records(load_from_hub(path, split), f"{path} {split}", columns, optional)


def _is_format(path: str) -> bool:
    """Tell whether ``datasets`` takes a name for a kind of files, and would read all such files that lie here."""
    return path.isidentifier() and find_spec(f"datasets.packaged_modules.{path}") is not None


def _word_or_number(record: Record, column: str) -> int | str:
    value = value_of(record, column)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise DataError(
            f"{record.place}: {column!r} must be a whole number or a word, got {shown(value)}; correct it or remove "
            "the row"
        )
    return value
