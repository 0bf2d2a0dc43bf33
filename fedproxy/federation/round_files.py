"""One safetensors file per round in a folder, written whole or not at all, and such a folder for each client."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fedproxy.errors import CheckpointError
from fedproxy.files import flush
from fedproxy.names import file_stem

_NAME = re.compile(r"round_(\d{4,})\.safetensors")
_KEPT = 3
"""Files that stay per client: one for the round under way, one for each of the loop's two latest checkpoints."""


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
            is_new = not self.folder.is_dir()
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, part, dict(metadata))
            flush([part])
            part.replace(final)
            flush([self.folder, *([self.folder.parent] if is_new else [])])
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


class ClientFiles:
    """The round files of many clients, a folder for each.

    A client's folder has one file per round it took part in, and only the latest few: a run that goes on from its last
    checkpoint, or the one before, finds every client's file as it was then, whatever was written later.

    Args:
        folder: Holds the clients' folders; made when something is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def of(self, client_id: str) -> RoundFiles:
        """Return one client's files; see :func:`fedproxy.names.file_stem`."""
        return RoundFiles(self.folder / file_stem(client_id))

    def write(
        self, client_id: str, round_: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
    ) -> None:
        """Write a client's file of a round, and delete those that no checkpoint needs any more.

        Raises:
            CheckpointError: If it cannot be written.
        """
        files = self.of(client_id)
        files.write(round_, tensors, metadata or {})
        for old in files.rounds()[:-_KEPT]:
            files.remove(old)

    def rewind(self, round_: int) -> None:
        """Delete what was written after round ``round_``."""
        if self.folder.is_dir():
            for folder in self.folder.iterdir():
                RoundFiles(folder).rewind(round_)
