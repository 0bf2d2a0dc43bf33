"""The one door for clients' updates, whatever engine or site they come from.

The server knows beforehand what an update of a round looks like: its tensors with their names, shapes and dtypes, and
so its size. A file is opened as a regular one that is no link, then its size and the length of its header are looked
at, then the header is parsed, once, and compared. Only then are the tensors copied to a place of the server's own,
which nobody else can change: what is checked and what is merged are the same bytes.
"""

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from io import BufferedReader, FileIO
from pathlib import Path

import torch
from safetensors import SafetensorError

from fedproxy.errors import CheckpointError, ClientError, one_line
from fedproxy.federation.server.expected import Expected
from fedproxy.files import open_regular
from fedproxy.messages import UpdateFile
from fedproxy.protocol import Broadcast, ClientUpdate, TensorFile, Tensors
from fedproxy.tensor_files import Layout

_METADATA = 1 << 14
"""Most bytes of a header beside its tensors: the update's figures, and the blanks that fill it up."""
_ENTRY = 120
"""Most bytes that a header spends on a tensor beside its name and shape."""
_CALLED = Path("its update")
"""What messages call the file: they are kept, and name no folder of this machine."""
_COPIED = 1 << 18
"""Bytes that are copied at once: few enough to stay in a core's cache between reading and writing."""


@dataclass(frozen=True)
class Kind:
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        """Return them for a message."""
        return f"{str(self.dtype).removeprefix('torch.')} {self.shape}"


Parts = Mapping[str, Mapping[str, Kind]]
"""The tensors of an update by part: ``""`` is its delta, the others are its groups of extras."""


@dataclass(frozen=True)
class Form:
    """The only form that an update of a round may have."""

    parts: Parts

    @classmethod
    def of(cls, broadcast: Broadcast, expected: Expected) -> "Form":
        """Return the form of the updates to a broadcast that is addressed to its client."""
        extras = {group: form.tensors for group, form in expected.extras.items()}
        return cls(_kinds(broadcast.state if expected.delta is None else expected.delta, extras))

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(
            torch.Size(kind.shape).numel() * kind.dtype.itemsize
            for tensors in self.parts.values()
            for kind in tensors.values()
        )

    @cached_property
    def most_header(self) -> int:
        """Longest header in bytes of a file of this form."""
        names = (
            len(json.dumps(_prefix(part) + name)) + len(json.dumps(kind.shape)) + _ENTRY
            for part, tensors in self.parts.items()
            for name, kind in tensors.items()
        )
        return sum(names) + _METADATA

    def check(self, sent: Parts) -> None:
        """Compare what was sent.

        Raises:
            ClientError: Naming the first part or tensor that is missing, unknown or of another kind.
        """
        _check_names(sent, self.parts, "extras", "extras that the round asks for")
        for part, wanted in self.parts.items():
            where = f"extras[{part!r}] " if part else ""
            asked = "tensors that the round asks for" if part else "tensors of the broadcast state"
            _check_names(sent[part], wanted, f"{where}tensor", asked)
            for name, kind in wanted.items():
                if sent[part][name] != kind:
                    raise ClientError(
                        f"{where}tensor {name!r} must be {kind}, got {sent[part][name]}; send the shape and dtype "
                        "that the round asks for"
                    )


class Vault:
    """The server's own copies of a round's updates: one file without a name, gone when nothing reads it any more.

    Args:
        folder: Where its bytes lie; None is the system's folder for temporary files.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder, self._end = folder, 0
        self._file: FileIO | None = None

    def take(self, source: BufferedReader, layout: Layout) -> TensorFile:
        """Copy the data of an open file and return its tensors.

        Raises:
            ClientError: If the file ends before its data do.
            CheckpointError: If the copy cannot be written.
        """
        start = self._end
        buffer = memoryview(bytearray(min(_COPIED, max(1, layout.nbytes))))
        for done in range(0, layout.nbytes, _COPIED):
            chunk = buffer[: min(_COPIED, layout.nbytes - done)]
            if os.preadv(source.fileno(), [chunk], layout.start + done) != len(chunk):
                raise ClientError("its update became shorter while it was read; send it again and leave it alone")
            self._write(chunk, start + done)
        self._end = start + layout.nbytes
        return TensorFile.over(_CALLED, self._opened(), layout, start)

    def _write(self, chunk: memoryview, place: int) -> None:
        try:
            while len(chunk):
                written = os.pwrite(self._opened().fileno(), chunk, place)
                chunk, place = chunk[written:], place + written
        except OSError as error:
            where = self._folder or tempfile.gettempdir()
            raise CheckpointError(
                f"updates cannot be copied to {where} ({error.strerror}); free disk space, then resume=auto"
            ) from error

    def _opened(self) -> FileIO:
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115
        return self._file


def admit(answer: ClientUpdate | UpdateFile, form: Form, vault: Vault) -> ClientUpdate:
    """Take in an update of the one form that its round allows; its values are not looked at.

    Args:
        answer: The update. A file is deleted once it is taken in, or refused.
        form: Its form.
        vault: Where the tensors of a file go.

    Raises:
        ClientError: In one line, if the update is in another's name, is no regular file, has another form, or more
            bytes than that form has.
        CheckpointError: If the server cannot write its copy.
    """
    if isinstance(answer, ClientUpdate):
        form.check(_kinds(answer.delta, answer.extras))
        return answer
    try:
        with open_regular(answer.path) as source:
            update = _from(source, form, vault)
    except OSError as error:
        raise ClientError(f"its update cannot be read ({error.strerror or one_line(error)})") from error
    finally:
        with suppress(OSError):
            answer.path.unlink()
    if update.client_id != answer.client_id:
        raise ClientError(f"its update is in the name of client {one_line(repr(update.client_id), 100)}")
    return update


def _from(source: BufferedReader, form: Form, vault: Vault) -> ClientUpdate:
    size, most = os.fstat(source.fileno()).st_size, 8 + form.most_header + form.nbytes
    if size > most:
        raise ClientError(f"its update has {size} bytes, an update of this round has at most {most}")
    try:
        layout = Layout.read(source, most_header=form.most_header)
    except SafetensorError as error:
        raise ClientError(f"its update is not a readable safetensors file ({one_line(error, 160)})") from error
    form.check(_parts(layout, form))
    # The metadata before the tensors: nothing is copied of what is no update.
    update = ClientUpdate.of(TensorFile.over(_CALLED, source, layout, layout.start))
    _check_names({"", *update.extras}, form.parts, "extras", "extras that the round asks for")
    return ClientUpdate.of(vault.take(source, layout))


def _parts(layout: Layout, form: Form) -> Parts:
    """Sort the tensors of a file by the parts that a form has."""
    found: dict[str, dict[str, Kind]] = {part: {} for part in form.parts}
    for name, entry in layout.tensors.items():
        part = next((part for part in form.parts if name.startswith(_prefix(part))), None)
        if part is None:
            raise ClientError(f"the update has unknown tensor {_shown(name)}; send what the round asks for alone")
        found[part][name.removeprefix(_prefix(part))] = Kind(entry.shape, entry.dtype)
    return found


def _prefix(part: str) -> str:
    return f"extras/{part}/" if part else "delta/"


def _kinds(delta: Tensors, extras: Mapping[str, Tensors]) -> Parts:
    """Return shape and dtype of all tensors, of which those in files are not read."""
    return {part: {name: _kind(tensors, name) for name in tensors} for part, tensors in {"": delta, **extras}.items()}


def _kind(tensors: Tensors, name: str) -> Kind:
    if isinstance(tensors, TensorFile):
        return Kind(tensors.shape(name), tensors.dtype(name))
    return Kind(tuple(tensors[name].shape), tensors[name].dtype)


def _check_names(sent: Iterable[str], asked: Iterable[str], what: str, all_of_them: str) -> None:
    wanted = set(asked)
    odd = sorted(wanted.symmetric_difference(sent))
    if odd:
        verb = "lacks" if odd[0] in wanted else "has unknown"
        raise ClientError(f"the update {verb} {what} {_shown(odd[0])}; send exactly the {all_of_them}")


def _shown(name: str) -> str:
    return one_line(repr(name), 100)
