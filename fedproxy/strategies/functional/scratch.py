"""A buffer that is used again and again: fresh memory for every block would cost more than the arithmetic."""

import math

import torch
from torch import Tensor


class Scratch:
    """Hands out views of one growing buffer; each view is valid until the next one is asked for."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self._buffer = torch.empty(0, dtype=dtype)

    def take(self, *shape: int) -> Tensor:
        """Return an uninitialised tensor of this shape."""
        size = math.prod(shape)
        if self._buffer.numel() < size:
            self._buffer = torch.empty(size, dtype=self._buffer.dtype)
        return self._buffer[:size].view(shape)
