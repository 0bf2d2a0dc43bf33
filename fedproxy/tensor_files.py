"""Safetensors files read as if a stranger wrote them: one look at a bounded header, then one tensor at a time.

Nothing is mapped into memory, so that a file that somebody cuts short while it is read is an error and no crash.
"""

import errno
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fedproxy.errors import ClientError, one_line
from fedproxy.files import open_regular

Tensors = Mapping[str, Tensor]
MOST_HEADER = 100_000_000
"""Longest header in bytes, as in the safetensors library."""
_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    "BOOL": torch.bool,
}
"""safetensors' names of the dtypes that may cross the wire."""
_LENGTH = 8
"""Bytes that hold the header's length."""
_SYSTEM = re.compile(r"\(os error (\d+)\)")
"""How the library says that a file could not be written: the system's number of the error."""


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies and what it is."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    """First byte, counted from where the data begin."""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Layout:
    """What a header says: the tensors in the order of the file, which they fill without gap or overlap."""

    tensors: Mapping[str, Entry]
    metadata: Mapping[str, str]
    start: int
    """Byte of the file at which the data begin."""
    nbytes: int
    """Bytes of the data, the rest of the file."""

    @classmethod
    def read(cls, file: BufferedReader, *, most_header: int = MOST_HEADER) -> "Layout":
        """Read and check the header of an open file.

        Args:
            file: The file; its position plays no part and stays.
            most_header: Longest header in bytes, looked at before the header is read.

        Raises:
            SafetensorError: In one line, if it is not a whole safetensors file, or its header is longer.
            OSError: If it cannot be read.
        """
        size, first = os.fstat(file.fileno()).st_size, os.pread(file.fileno(), _LENGTH, 0)
        length = int.from_bytes(first, "little")
        if len(first) < _LENGTH or size < _LENGTH + length:
            raise SafetensorError("the file is shorter than its header")
        if length > most_header:
            raise SafetensorError(f"its header has {length} bytes, {most_header} are the most")
        try:
            header = json.loads(os.pread(file.fileno(), length, _LENGTH), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise SafetensorError(f"its header is not JSON that can be read ({_reason(error)})") from None
        if not isinstance(header, dict):
            raise SafetensorError("its header is not a JSON object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise SafetensorError("its metadata are not texts")
        start = _LENGTH + length
        return cls(_entries(header, size - start), metadata, start, size - start)


class TensorFile(Mapping[str, Tensor]):
    """Tensors of one safetensors file, read one at a time when asked for.

    Args:
        path: The file: a regular one, no link. It stays open for as long as something reads from it.
        prefix: Only tensors whose name starts with this are seen, under the rest of their name.

    Raises:
        SafetensorError: If it is not a whole safetensors file.
        OSError: If it cannot be opened.
    """

    def __init__(self, path: str | Path, prefix: str = "") -> None:
        file = open_regular(path)
        try:
            layout = Layout.read(file)
        except BaseException:
            file.close()
            raise
        self._see(Path(path), file, layout, layout.start, prefix)

    @classmethod
    def over(cls, path: Path, file: Any, layout: Layout, start: int) -> "TensorFile":
        """Return the tensors of data that were copied elsewhere.

        Args:
            path: What messages call them.
            file: Where they lie now: anything with a ``fileno``, kept open from here on.
            layout: What their header said.
            start: Byte of ``file`` at which they begin.
        """
        tensors = cls.__new__(cls)
        tensors._see(path, file, layout, start, "")
        return tensors

    def under(self, prefix: str) -> "TensorFile":
        """Return a view of the tensors whose name starts with ``prefix``; nothing is opened or parsed again."""
        view = type(self).__new__(type(self))
        view._see(self.path, self._file, self._layout, self._start, self.prefix + prefix)
        return view

    def _see(self, path: Path, file: Any, layout: Layout, start: int, prefix: str) -> None:
        self.path, self.prefix = path, prefix
        self._file, self._layout, self._start = file, layout, start
        found = sorted(name for name in layout.tensors if name.startswith(prefix))
        self._entries = {name.removeprefix(prefix): layout.tensors[name] for name in found}

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor, in its shape and dtype."""
        entry = self._entries[name]
        return self.part(name, 0, math.prod(entry.shape)).view(entry.shape)

    def __iter__(self) -> Iterator[str]:
        """Yield the names of all tensors."""
        return iter(self._entries)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._entries)

    @property
    def metadata(self) -> Mapping[str, str]:
        """The header's own texts."""
        return self._layout.metadata

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype without reading it."""
        return self._entries[name].dtype

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors take, without reading them."""
        return sum(entry.nbytes for entry in self._entries.values())

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """Return coordinates [start, stop) of the flattened tensor.

        Raises:
            ClientError: If the file ends too early.
        """
        entry = self._entries[name]
        tensor = torch.empty(stop - start, dtype=entry.dtype)
        left: memoryview = memoryview(tensor.view(torch.uint8).numpy())  # type: ignore[arg-type]
        place = self._start + entry.begin + start * entry.dtype.itemsize
        while len(left):  # one call reads at most 2 GiB
            read = os.preadv(self._file.fileno(), [left], place)
            if not read:
                raise ClientError(f"{self.path} ends within tensor {name!r}; ask its sender to send it again")
            left, place = left[read:], place + read
        return tensor


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file.

    Raises:
        OSError: If it cannot be written, a full disk included, which the library says by an error of its own.
    """
    try:
        save_file(dict(tensors), path, dict(metadata))
    except SafetensorError as error:
        found = _SYSTEM.search(str(error))
        number = int(found[1]) if found else errno.EIO
        raise OSError(number, os.strerror(number) if found else one_line(error), str(path)) from error


def nbytes(tensors: Tensors) -> int:
    """Return the bytes that the tensors of a mapping take."""
    if isinstance(tensors, TensorFile):
        return tensors.nbytes
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _entries(header: Mapping[str, Any], size: int) -> dict[str, Entry]:
    """Return what a header says of the tensors, which must fill ``size`` bytes one after the other."""
    found = {name: _entry(name, said) for name, said in header.items()}
    ordered = dict(sorted(found.items(), key=lambda item: (item[1].begin, item[1].nbytes)))
    end = 0
    for name, entry in ordered.items():
        if entry.begin != end:
            raise SafetensorError(f"tensor {one_line(repr(name), 60)} does not begin where the one before it ends")
        end += entry.nbytes
    if end != size:
        raise SafetensorError(f"its tensors have {end} bytes, and the file holds {size}")
    return ordered


def _entry(name: str, said: Any) -> Entry:
    what = f"tensor {one_line(repr(name), 60)}"
    if not isinstance(said, dict) or set(said) != {"dtype", "shape", "data_offsets"}:
        raise SafetensorError(f"{what} must have dtype, shape and data_offsets")
    kind, shape, offsets = said["dtype"], said["shape"], said["data_offsets"]
    if not isinstance(kind, str) or kind not in _DTYPES:
        raise SafetensorError(f"{what} is of type {one_line(kind, 20)}; send one of {', '.join(_DTYPES)}")
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise SafetensorError(f"{what} must have whole numbers from 0 as shape and as two data_offsets")
    entry = Entry(_DTYPES[kind], tuple(shape), offsets[0])
    if entry.nbytes != offsets[1] - offsets[0]:
        raise SafetensorError(f"{what} has other data_offsets than its shape needs")
    return entry


def _counts(value: Any) -> bool:
    """Whether a value is a list of whole numbers that a file can hold."""
    return isinstance(value, list) and len(value) <= 64 and all(type(n) is int and 0 <= n < 1 << 62 for n in value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object, of which each key may be named once."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is named twice")
    return found


def _reason(error: Exception) -> str:
    return "it is nested too deeply" if isinstance(error, RecursionError) else one_line(error, 80)
