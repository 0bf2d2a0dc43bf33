"""One safetensors file per round in a folder, written whole or not at all and verified when it is read.

There is such a folder for each client.
"""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from fedproxy.errors import CheckpointError
from fedproxy.files import flush
from fedproxy.names import file_stem
from fedproxy.sealed import RESTART, remove
from fedproxy.sealed_tensors import check_tensors, save_tensors, tensors_sha256

_NAME = re.compile(r"round_(\d{4,})\.safetensors")
_KEPT = 3
"""Files that stay per client: one for the round under way, one for each of the loop's two latest checkpoints."""


def joint_seal(seals: Sequence[str]) -> str:
    """Return one hash that stands for several; nothing for none."""
    return hashlib.sha256(" ".join(seals).encode()).hexdigest() if seals else ""


class RoundFiles:
    """The files of one folder, by round.

    Args:
        folder: Made when something is written.
        owner: Whose files they are, which each of them says as well; empty where they are everybody's.
        seen: Files that were verified, with what changes when they are written again, and their hash; shared by those
            who read alike.
    """

    def __init__(self, folder: Path, owner: str = "", seen: dict[Path, tuple[object, ...]] | None = None) -> None:
        self.folder, self.owner, self._seen = folder, owner, {} if seen is None else seen

    def rounds(self) -> list[int]:
        """Return the rounds that have a file, ascending."""
        if not self.folder.is_dir():
            return []
        return sorted(int(match[1]) for path in self.folder.iterdir() if (match := _NAME.fullmatch(path.name)))

    def path(self, round_: int) -> Path:
        """Return where a round's file is."""
        return self.folder / f"round_{round_:04d}.safetensors"

    def verified(self, round_: int, seal: str | None = None) -> Path:
        """Return where a round's file is, after it was read through once and has the hash that it was written with.

        Args:
            round_: The round.
            seal: The hash that it must have, where that is known.

        Raises:
            CheckpointError: If the file is missing or damaged, or that of another round or client.
        """
        path = self.path(round_)
        try:
            status = path.stat()
            stamp = (status.st_ino, status.st_size, status.st_mtime_ns)
            *known, found = self._seen.get(path, (None,))
            if tuple(known) != stamp:
                found = check_tensors(path, {"round": str(round_), "owner": self.owner})["sha256"]
            if seal not in (None, found):
                raise ValueError("it is not the one that the checkpoint was written with")
            self._seen[path] = (*stamp, found)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CheckpointError(f"{self._what} in {path} cannot be used: {reason}; {RESTART}") from error
        return path

    def write(self, round_: int, tensors: Mapping[str, Tensor]) -> str:
        """Write a round's file under another name, flush it to disk, rename it, and return its hash.

        Raises:
            CheckpointError: If it cannot be written.
        """
        final = self.path(round_)
        part = final.with_suffix(f".part{os.getpid()}")  # several processes may write the same round
        try:
            is_new = not self.folder.is_dir()
            self.folder.mkdir(parents=True, exist_ok=True)
            seal = save_tensors(part, tensors, {"round": str(round_), "owner": self.owner})
            part.replace(final)
            flush([self.folder, *([self.folder.parent] if is_new else [])])
        except OSError as error:
            raise CheckpointError(
                f"{final} cannot be written: {error.strerror or error}; free space, then resume=auto"
            ) from error
        return seal

    def keep(self, round_: int, tensors: Mapping[str, Tensor]) -> None:
        """Write a round's file unless the very same is there.

        Raises:
            CheckpointError: If it cannot be written.
        """
        try:
            self.verified(round_, tensors_sha256(tensors, {"round": str(round_), "owner": self.owner}))
        except CheckpointError:  # not there, damaged, or what a killed run left
            self.write(round_, tensors)

    def seal(self, last: int) -> str:
        """Return one hash for the files of rounds 1 to ``last``; nothing where that is no round.

        Raises:
            CheckpointError: If a file is missing or damaged.
        """
        for number in range(1, last + 1):
            self.verified(number)
        return joint_seal([str(self._seen[self.path(number)][-1]) for number in range(1, last + 1)])

    def remove(self, round_: int) -> None:
        """Delete a round's file if there is one."""
        remove(self.path(round_))

    def rewind(self, round_: int) -> None:
        """Delete the files of all rounds after ``round_``, and what a killed process left half-written."""
        for later in self.rounds():
            if later > round_:
                self.remove(later)
        for part in self.folder.glob("*.part*"):
            remove(part)

    @property
    def _what(self) -> str:
        return f"what is kept of client {self.owner!r}" if self.owner else "the change of the frozen weights"


class ClientFiles:
    """The round files of many clients, a folder for each.

    A client's folder has one file per round it took part in, and only the latest few: a run that goes on from its last
    checkpoint, or the one before, finds every client's file as it was then, whatever was written later.

    Args:
        folder: Holds the clients' folders; made when something is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._seen: dict[Path, tuple[object, ...]] = {}

    def of(self, client_id: str) -> RoundFiles:
        """Return one client's files; see :func:`fedproxy.names.file_stem`."""
        return RoundFiles(self.folder / file_stem(client_id), client_id, self._seen)

    def write(self, client_id: str, round_: int, tensors: Mapping[str, Tensor]) -> str:
        """Write a client's file of a round, delete those that no checkpoint needs any more, and return its hash.

        Raises:
            CheckpointError: If it cannot be written.
        """
        files = self.of(client_id)
        seal = files.write(round_, tensors)
        for old in files.rounds()[:-_KEPT]:
            files.remove(old)
        return seal

    def rewind(self, round_: int) -> None:
        """Delete what was written after round ``round_``."""
        if self.folder.is_dir():
            for folder in self.folder.iterdir():
                if folder.is_dir():
                    RoundFiles(folder).rewind(round_)
