"""What a client released, kept beside its ledger: whoever asks for the same again is answered with the same bits."""

import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from fedproxy.errors import CheckpointError
from fedproxy.files import private_folder
from fedproxy.names import file_stem
from fedproxy.round_files import RoundFiles
from fedproxy.sealed import remove
from fedproxy.tensor_files import TensorFile, Tensors

FOLDER = "releases"
"""Name of the folder of releases beside the ledgers."""
_TENSOR, _FIGURE = "tensor/", "figure/"
_STALE_S = 86_400.0
"""Nobody still writes a file that was begun a day ago."""


class Releases:
    """One client's latest releases: a file for each, by the number of its charge.

    Args:
        folder: The folder of ledgers.
        client_id: The client.
    """

    def __init__(self, folder: Path, client_id: str) -> None:
        self._folder = folder
        self._files = RoundFiles(folder / FOLDER / file_stem(client_id), client_id)

    def write(self, number: int, tensors: Tensors, figures: Tensors) -> str:
        """Write a release, flush it to the disk, and return its seal.

        Args:
            number: Of its charge.
            tensors: The update as it leaves the client, before it is masked, or the state that it was made from.
            figures: Single numbers that later steps need beside it.

        Raises:
            CheckpointError: If it cannot be written.
        """
        self._open()
        named: dict[str, Tensor] = {f"{_TENSOR}{name}": tensors[name] for name in tensors}
        return self._files.write(number, {**named, **{f"{_FIGURE}{name}": figures[name] for name in figures}})

    def read(self, number: int, seal: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return a release and its figures.

        Raises:
            CheckpointError: If it is damaged, gone, or another than was noted.
        """
        file = TensorFile(self._files.verified(number, seal))
        tensors, figures = file.under(_TENSOR), file.under(_FIGURE)
        return {name: tensors[name] for name in tensors}, {name: figures[name] for name in figures}

    def keep(self, numbers: Collection[int]) -> None:
        """Delete all older releases but these, and what a killed process left half-written.

        Another run may be at work here: a release of a later charge than these is its own.

        Raises:
            CheckpointError: If one cannot be deleted.
        """
        try:
            for number in self._files.rounds():
                if number not in numbers and number < max(numbers, default=0):
                    self._files.remove(number)
            for part in self._files.folder.glob("*.part*"):
                with suppress(FileNotFoundError):  # its process has just given it its name
                    if time.time() - part.stat().st_mtime > _STALE_S:
                        remove(part)
        except OSError as error:
            raise CheckpointError(
                f"{self._files.folder} cannot be tidied up ({error.strerror or error}); make it writable"
            ) from error

    def _open(self) -> None:
        try:
            private_folder(self._folder / FOLDER)
        except OSError as error:
            raise CheckpointError(
                f"privacy.ledger {self._folder} cannot be written ({error.strerror or error}); choose another folder"
            ) from error
