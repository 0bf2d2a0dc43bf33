"""Kept files that are verified when they are read: JSON that carries a hash of its content, and folders.

A hash shows what a disk, a copy or an editor changed. It is no defence against somebody who writes the hash as well.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from fedproxy.errors import CheckpointError
from fedproxy.files import file_sha256, plain, read_json, write_json

T = TypeVar("T")
_SEAL = "content_sha256"
_CARD = "README.md"
"""The one file of a model folder that is written again later."""
RESTART = "put back a copy of it, or start again with overwrite=true"


def content_sha256(content: Mapping[str, Any]) -> str:
    """Return the hash of plain content, the same whatever the order of its keys."""
    return hashlib.sha256(json.dumps(plain(content), sort_keys=True).encode()).hexdigest()


def write_sealed(path: str | Path, content: Mapping[str, Any], *, private: bool = False) -> Path:
    """Write a JSON object with a hash of itself; see :func:`fedproxy.files.write_json`."""
    return write_json(path, {**content, _SEAL: content_sha256(content)}, private=private)


def read_sealed(path: str | Path, *, remedy: str = RESTART) -> dict[str, Any] | None:
    """Return what :func:`write_sealed` wrote, or None where there is no such file.

    Raises:
        CheckpointError: In one line, if it is not what was written; the message ends with ``remedy``.
    """
    content = read_kept(path, dict, remedy=remedy)
    if content is None:
        return None
    if _SEAL not in content:
        raise CheckpointError(
            f"{path} has no hash of its content: another version of FedProxy wrote it; finish the run with that "
            f"version, or {remedy}"
        )
    seal = content.pop(_SEAL)
    if seal != content_sha256(content):
        raise CheckpointError(f"{path} is damaged: its content does not have the hash it was written with; {remedy}")
    return {str(key): value for key, value in content.items()}


def read_kept(path: str | Path, kind: type[T], *, remedy: str = RESTART) -> T | None:
    """Return a JSON file's content, or None where there is no such file.

    Raises:
        CheckpointError: In one line, if the file is there and cannot be used; the message ends with ``remedy``.
    """
    return read_json(path, kind, remedy=remedy) if os.path.lexists(path) else None


def tree_sha256(root: Path, *names: str) -> dict[str, str]:
    """Return SHA-256 and size of every file below the named files and folders, by its path from ``root``.

    Model cards and hidden files are left out; a name that is not there gives nothing.

    Raises:
        CheckpointError: If a file cannot be read.
    """
    found = {}
    try:
        for path in _files(root, names):
            found[path.relative_to(root).as_posix()] = f"{file_sha256(path)} {path.stat().st_size}"
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be read: {error.strerror or error}; {RESTART}") from error
    return found


def without_tree(known: Mapping[str, str], *names: str) -> dict[str, str]:
    """Return the hashes of files that do not lie below the named files and folders."""
    return {name: sha for name, sha in known.items() if not any(_is_below(name, top) for top in names)}


def check_tree(root: Path, known: Mapping[str, str], *names: str) -> None:
    """Compare files with the hashes that :func:`tree_sha256` gave when they were written.

    Raises:
        CheckpointError: Naming the first file that is missing, was changed or was added.
    """
    inside = {name: sha for name, sha in known.items() if any(_is_below(name, top) for top in names)}
    there = {path.relative_to(root).as_posix() for path in _files(root, names)}
    for name in sorted(inside.keys() | there):
        path = root / name
        if name not in inside:
            raise CheckpointError(f"{path} was added to what the run wrote; move it elsewhere")
        sha256, _, size = inside[name].partition(" ")
        try:
            # Sizes first: a file with a hole may have any, and takes as long to hash.
            same = size in ("", str(path.stat().st_size)) and file_sha256(path) == sha256
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}; {RESTART}") from error
        if not same:
            raise CheckpointError(f"{path} is not as the run wrote it: it has another SHA-256; {RESTART}")


def first_lost(root: Path, known: Mapping[str, str], pages: Iterable[str] = ()) -> Path | None:
    """Return the first file that is gone or has another size than :func:`tree_sha256` noted; nothing is hashed.

    Args:
        root: The folder.
        known: Hashes and sizes by path.
        pages: Files of any size.
    """
    for name, noted in [*known.items(), *((name, "") for name in pages)]:
        path, size = root / name, noted.partition(" ")[2]
        if not path.is_file() or size not in ("", str(path.stat().st_size)):
            return path
    return None


def remove(path: Path) -> None:
    """Delete a file or a folder, whichever lies there; a link is deleted itself.

    Raises:
        OSError: If it cannot be deleted.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _files(root: Path, names: Iterable[str]) -> list[Path]:
    tops = [root / name for name in names]
    inside = [path for top in tops for path in (top.rglob("*") if top.is_dir() else [top])]
    return sorted(
        path
        for path in inside
        if os.path.lexists(path) and not path.is_dir() and path.name != _CARD and not path.name.startswith(".")
    )


def _is_below(name: str, top: str) -> bool:
    path = Path(name)
    return path == Path(top) or Path(top) in path.parents
