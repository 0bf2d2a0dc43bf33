"""Round checkpoints: written whole or not at all, read back to the bit."""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedproxy.errors import CheckpointError
from fedproxy.files import flush

_NAME = re.compile(r"round_(\d{4,})")


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

    def remembered(self, name: str) -> dict[str, Tensor]:
        """Return what one of them remembers; nothing before the first round."""
        return self.memory.get(name, {})


class CheckpointFolder:
    """The checkpoints of one run.

    Args:
        folder: ``runs/<name>/checkpoints``.
        keep: How many of the latest checkpoints stay on disk.
    """

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def save(self, progress: Progress, *, pinned: int | None = None) -> None:
        """Write a checkpoint into a temporary folder, flush it to disk, and rename it; older ones are deleted.

        Args:
            progress: What to keep.
            pinned: A round whose checkpoint stays, however old it is.

        Raises:
            CheckpointError: If it cannot be written.
        """
        final = self.folder / f"round_{progress.round:04d}"
        part = self.folder / f".part_{progress.round:04d}"
        try:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            names: dict[str, list[str]] = {}
            groups: dict[str, Mapping[str, Tensor]] = {"state": progress.state, **progress.memory}
            for group, tensors in groups.items():
                names[group] = sorted(tensors)
                save_file(
                    {name: tensor.contiguous() for name, tensor in tensors.items()}, part / f"{group}.safetensors"
                )
            content = {"round": progress.round, "tensors": names, "records": progress.records}
            (part / "progress.json").write_text(json.dumps(content) + "\n")
            flush([*part.iterdir(), part])
            shutil.rmtree(final, ignore_errors=True)
            part.rename(final)
            flush([self.folder])
        except (OSError, SafetensorError) as error:  # a full disk comes as either
            raise CheckpointError(
                f"checkpoint {final} cannot be written: {error}; free space, then resume=auto"
            ) from error
        for old in self.rounds()[: -self.keep]:
            if old != pinned:
                shutil.rmtree(self.folder / f"round_{old:04d}")

    def rounds(self) -> list[int]:
        """Return the rounds that have a whole checkpoint, ascending."""
        if not self.folder.is_dir():
            return []
        return sorted(int(match[1]) for path in self.folder.iterdir() if (match := _NAME.fullmatch(path.name)))

    def load_latest(self) -> Progress | None:
        """Return the progress of the last whole checkpoint, or None where there is none.

        Raises:
            CheckpointError: If the checkpoint is damaged; the message names what is missing.
        """
        rounds = self.rounds()
        return self.load(rounds[-1]) if rounds else None

    def load(self, round_: int) -> Progress:
        """Return the progress after round ``round_``."""
        path = self.folder / f"round_{round_:04d}"
        hint = f"delete {path} to go on from the round before, or start again with overwrite=true"
        try:
            content = json.loads((path / "progress.json").read_text())
            listed: dict[str, list[str]] = content["tensors"]
            groups = {group: load_file(path / f"{group}.safetensors") for group in listed}
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise CheckpointError(f"checkpoint {path} is damaged ({error}); {hint}") from error
        for group, tensors in groups.items():
            if lost := sorted(set(listed[group]) - set(tensors)):
                raise CheckpointError(f"checkpoint {path} lacks the tensor {lost[0]} in {group}.safetensors; {hint}")
        return Progress(content["round"], groups.pop("state"), groups, content["records"])
