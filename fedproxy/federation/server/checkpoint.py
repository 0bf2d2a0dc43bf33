"""Round checkpoints: written whole or not at all, read back to the bit, and verified when they are read."""

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fedproxy.errors import CheckpointError, one_line
from fedproxy.files import flush
from fedproxy.protocol import Kept
from fedproxy.sealed import RESTART, read_sealed, remove, write_sealed
from fedproxy.sealed_tensors import check_tensors, save_tensors

_NAME = re.compile(r"round_(\d{4,})")


class Counted(TypedDict):
    """A client's last round that counts and after which it kept something, as its update said."""

    round: int
    seal: str
    examples: int
    tokens: int


@dataclass
class Progress:
    """Everything the round loop needs to go on after ``round``."""

    round: int
    """Last finished round; 0 before the first."""
    state: dict[str, Tensor]
    """Trainable state phi; where clients are never merged, the state that each of them starts from."""
    memory: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """What the server remembers, by who remembers it: ``aggregator``, ``server_optimizer``, and every round part."""
    records: list[dict[str, Any]] = field(default_factory=list)
    """One line of rounds.jsonl per finished round."""
    files: dict[str, dict[str, str]] = field(default_factory=dict)
    """The server's files without which nobody can go on from here: see
    :meth:`fedproxy.federation.server.files.ServerFiles.kept`."""
    kept: dict[str, Counted] = field(default_factory=dict)
    """What clients keep for themselves and go on from, by client."""

    def remembered(self, name: str) -> dict[str, Tensor]:
        """Return what one of them remembers; nothing before the first round."""
        return self.memory.get(name, {})

    def kept_by(self, client_id: str) -> Kept:
        """Return what a client goes on from."""
        return Kept(self.kept[client_id]["round"], self.kept[client_id]["seal"]) if client_id in self.kept else Kept()


class CheckpointFolder:
    """The checkpoints of one run.

    A checkpoint is a folder with one safetensors file per group, each with a hash of its content, and progress.json,
    which holds those hashes, the records, the run's key and a hash of itself.

    Args:
        folder: ``runs/<name>/checkpoints``.
        run: Key of the run's rounds: settings, rows and proxy; a checkpoint of another one is refused.
        keep: How many of the latest checkpoints stay on disk.
    """

    def __init__(self, folder: Path, *, run: str = "", keep: int = 2) -> None:
        self.folder, self.run, self.keep = folder, run, keep

    def save(self, progress: Progress, *, pinned: int | None = None) -> None:
        """Write a checkpoint into a temporary folder, flush it to disk, and rename it.

        Older ones are deleted then, and those of later rounds, which are damaged or this one would not be written.

        Args:
            progress: What to keep.
            pinned: A round whose checkpoint stays, however old it is.

        Raises:
            CheckpointError: If it cannot be written.
        """
        final = self._path(progress.round)
        part = self.folder / f".part_{progress.round:04d}"
        try:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            hashes: dict[str, str] = {}
            groups: dict[str, Mapping[str, Tensor]] = {"state": progress.state, **progress.memory}
            for group, tensors in groups.items():
                facts = {"round": str(progress.round), "group": group}
                hashes[group] = save_tensors(part / f"{group}.safetensors", tensors, facts)
            content = {
                "round": progress.round,
                "run": self.run,
                "tensors": hashes,
                "files": progress.files,
                "kept": progress.kept,
                "records": progress.records,
            }
            write_sealed(part / "progress.json", content)
            flush([part])
            remove(final)
            part.rename(final)
            flush([self.folder])
        except OSError as error:
            raise CheckpointError(
                f"checkpoint {final} cannot be written: {error.strerror or error}; free space, then resume=auto"
            ) from error
        kept = [number for number in self.rounds() if number <= progress.round][-self.keep :]
        for other in self.rounds():
            if other not in kept and other != pinned:
                remove(self._path(other))

    def rounds(self) -> list[int]:
        """Return the rounds that have a checkpoint, ascending."""
        if not self.folder.is_dir():
            return []
        return sorted(int(match[1]) for path in self.folder.iterdir() if (match := _NAME.fullmatch(path.name)))

    def load_latest(
        self,
        check: Callable[[Progress], None] = lambda progress: None,
        say: Callable[[str], None] = lambda line: None,
    ) -> Progress | None:
        """Return the progress of the last checkpoint that is whole, or None where there is no checkpoint.

        Args:
            check: Raises a CheckpointError for a progress that nobody can go on from.
            say: Is given one line where the last checkpoint is damaged and one before it is taken.

        Raises:
            CheckpointError: If none is whole; the message names the last one's fault.
        """
        fault: CheckpointError | None = None
        for number in reversed(self.rounds()):
            try:
                progress = self._read(number)
                check(progress)
            except CheckpointError as error:
                fault = fault or error
                continue
            if fault is not None:
                say(f"{fault}; going on after round {number}, from the checkpoint before it")
            return progress
        if fault is not None:
            raise CheckpointError(f"{fault}, and no checkpoint before it is whole; {RESTART}")
        return None

    def load(self, round_: int) -> Progress:
        """Return the progress after round ``round_``.

        Raises:
            CheckpointError: If the checkpoint is damaged, or that of another round or run.
        """
        try:
            return self._read(round_)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {RESTART}") from error

    def _read(self, round_: int) -> Progress:
        path = self._path(round_)
        try:
            content = read_sealed(path / "progress.json", remedy="")
            if content is None:
                raise ValueError("progress.json is missing")
            if content["run"] != self.run:
                raise ValueError("it is of another run")
            if content["round"] != round_:
                raise ValueError(f"it is of round {content['round']}")
            groups = {group: _group(path, group, seal) for group, seal in content["tensors"].items()}
        except (ValueError, KeyError, CheckpointError) as error:
            raise CheckpointError(f"checkpoint {path} is damaged ({one_line(error).rstrip('; ')})") from error
        return Progress(round_, groups.pop("state"), groups, content["records"], content["files"], content["kept"])

    def _path(self, round_: int) -> Path:
        return self.folder / f"round_{round_:04d}"


def _group(folder: Path, group: str, seal: str) -> dict[str, Tensor]:
    path = folder / f"{group}.safetensors"
    try:
        if check_tensors(path, {"group": group})["sha256"] != seal:
            raise ValueError("it belongs to another checkpoint")
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"{path.name}: {one_line(error)}") from error
    return tensors
