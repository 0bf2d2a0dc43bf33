"""Where merged tensors go: into memory, or straight into a safetensors file that no machine's memory must hold."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fedproxy.protocol import TensorFile, Tensors
from fedproxy.strategies.functional.scratch import Scratch

_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class Sink:
    """Collects merged tensors in memory."""

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._sizes: dict[str, int] = {}
        self._nonzero: dict[str, int] = {}
        self._scratch = Scratch()

    @property
    def size(self) -> int:
        """Coordinates of all tensors."""
        return sum(self._sizes.values())

    @property
    def nonzero(self) -> int:
        """Coordinates written that are not zero, as far as they were counted."""
        return sum(self._nonzero.values())

    def open(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> None:
        """Make room for a tensor; different tensors may be opened and written side by side."""
        self._tensors[name] = torch.empty(tuple(shape), dtype=dtype)
        self._sizes[name] = math.prod(shape)

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Write values, float32 (n,), at a place of the flattened tensor, in the tensor's dtype."""
        self._tensors[name].view(-1)[start : start + len(values)] = values

    def count(self, name: str, values: Tensor) -> None:
        """Count what is not zero among values that were written, float32 (n,)."""
        signs = torch.sign(values, out=self._scratch.take(len(values)))
        self._nonzero[name] = self._nonzero.get(name, 0) + int(torch.dot(signs, signs))

    def patch(self, name: str, index: Tensor, values: Tensor) -> None:
        """Overwrite coordinates that were written as zero, and count them.

        Args:
            name: The tensor.
            index: int64 (n,), ascending.
            values: float32 (n,).
        """
        flat = self._tensors[name].view(-1)
        flat[index] = values.to(flat.dtype)
        self.count(name, values)

    def tensors(self) -> Tensors:
        """Return what was written, in sorted-name order."""
        return dict(sorted(self._tensors.items()))


class FileSink(Sink):
    """Writes merged tensors into one safetensors file.

    Args:
        path: The file, overwritten.
        layout: Name, shape and dtype of every tensor to come.
    """

    def __init__(self, path: Path, layout: Sequence[tuple[str, Sequence[int], torch.dtype]]) -> None:
        super().__init__()
        self._path, self._places, header, end = path, {}, {}, 0
        for name, shape, dtype in layout:
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
            self._places[name] = (begin, dtype)
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._data_start = 8 + len(text)
        self._file = path.open("w+b")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self._data_start + end)

    def open(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> None:
        """Count the tensor; its room is made already."""
        self._sizes[name] = math.prod(shape)

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Write values at a place of the flattened tensor."""
        self._put(name, start, values)

    def patch(self, name: str, index: Tensor, values: Tensor) -> None:
        """Overwrite coordinates that were written as zero, and count them."""
        for place, value in zip(index.tolist(), torch.split(values, 1), strict=True):
            self._put(name, place, value)
        self.count(name, values)

    def tensors(self) -> Tensors:
        """Return the file's tensors, read when asked for."""
        self._file.flush()
        return TensorFile(self._path)

    def _put(self, name: str, start: int, values: Tensor) -> None:
        begin, dtype = self._places[name]
        raw = values.to(dtype).contiguous().view(torch.uint8).numpy().tobytes()
        os.pwrite(self._file.fileno(), raw, self._data_start + begin + start * dtype.itemsize)
