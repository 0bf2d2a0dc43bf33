"""One safetensors file per round in a folder, written whole or not at all."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fedproxy.errors import CheckpointError

_NAME = re.compile(r"round_(\d{4,})\.safetensors")


class RoundFiles:
    """The files of one folder, by round.

    Args:
        folder: Made when something is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def rounds(self) -> list[int]:
        """Return the rounds that have a file, ascending."""
        if not self.folder.is_dir():
            return []
        return sorted(int(match[1]) for path in self.folder.iterdir() if (match := _NAME.fullmatch(path.name)))

    def path(self, round_: int) -> Path:
        """Return where a round's file is."""
        return self.folder / f"round_{round_:04d}.safetensors"

    def write(self, round_: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Write a round's file under another name, flush it to disk, and rename it.

        Raises:
            CheckpointError: If it cannot be written.
        """
        final = self.path(round_)
        part = final.with_suffix(f".part{os.getpid()}")  # several processes may write the same round
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, part, dict(metadata))
            with part.open("rb") as file:
                os.fsync(file.fileno())
            part.replace(final)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{final} cannot be written: {error}; free space, then resume=auto") from error

    def remove(self, round_: int) -> None:
        """Delete a round's file if there is one."""
        self.path(round_).unlink(missing_ok=True)

    def rewind(self, round_: int) -> None:
        """Delete the files of all rounds after ``round_``, and what a killed process left half-written."""
        for later in self.rounds():
            if later > round_:
                self.remove(later)
        for part in self.folder.glob("*.part*"):
            part.unlink()
