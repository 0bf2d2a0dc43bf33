"""Download one wheel: through pip where there is one, else from the configured index; verified before it counts."""

import hashlib
import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from fedproxy.data.assets import pip
from fedproxy.data.assets.entries import Wheel
from fedproxy.data.assets.index import download_from_index
from fedproxy.data.assets.progress import byte_bar
from fedproxy.errors import AssetError


def download(wheel: Wheel, folder: Path, *, progress: bool = True) -> Path:
    """Return the verified wheel in ``folder``, downloading it if it is not there.

    Raises:
        AssetError: If it cannot be downloaded or its SHA-256 is not the catalog's.
    """
    from filelock import FileLock

    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f".{wheel.file}.lock"):  # several assets may come from one wheel
        return _download(wheel, folder, progress)


def _download(wheel: Wheel, folder: Path, progress: bool) -> Path:
    target = folder / wheel.file
    if target.exists():
        if sha256(target) != wheel.sha256:
            raise AssetError(
                f"{target} has not the SHA-256 of {wheel.name}=={wheel.version} ({wheel.sha256[:12]}...); "
                "delete it and fetch again"
            )
        return target
    through_pip = importlib.util.find_spec("pip") is not None
    free, need = shutil.disk_usage(folder).free, wheel.bytes * (2 if through_pip else 1)  # pip copies what it fetched
    if free < need:
        raise AssetError(
            f"{wheel.file} needs {need / 1e6:.0f} MB under {folder}, {free / 1e6:.0f} MB are free; "
            "free some or set FEDPROXY_CACHE to a larger disk"
        )
    with byte_bar(f"downloading {wheel.name} {wheel.version}", wheel.bytes, progress) as advance:
        fetched = (_through_pip if through_pip else download_from_index)(wheel, folder, advance)
    found = sha256(fetched)
    if found != wheel.sha256:
        fetched.unlink()
        raise AssetError(
            f"{wheel.file} from the package index has SHA-256 {found[:12]}..., the catalog says "
            f"{wheel.sha256[:12]}...; nothing was kept: ask who runs the index, or put the right file into {folder}"
        )
    os.replace(fetched, target)
    return target


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _through_pip(wheel: Wheel, folder: Path, advance: Callable[[int], None]) -> Path:
    """Go on with what an interrupted download left; where that does not work, let pip start from the beginning."""
    part = folder / f"{wheel.file}.part"
    pip.salvage(wheel, folder, part)
    if part.exists():  # pip cannot go on where it stopped, the simple API can
        try:
            if sha256(download_from_index(wheel, folder, advance)) == wheel.sha256:
                return part
        except AssetError:
            pass
    return pip.download_with_pip(wheel, folder, advance)
