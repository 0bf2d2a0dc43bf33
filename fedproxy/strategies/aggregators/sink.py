"""Where merged tensors go, one block at a time."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedproxy.protocol import Tensors
from fedproxy.strategies.functional.scratch import Scratch


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

    def room(self, name: str, start: int, count: int) -> Tensor:
        """Return where ``count`` values go, from ``start`` of the flattened tensor, to be written in place."""
        return self._tensors[name].view(-1)[start : start + count]

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
