"""Buffers that are used again and again: fresh memory for every block would cost more than the arithmetic."""

import math
import threading

import torch
from torch import Tensor


class Scratch:
    """Hands out views of growing buffers, every thread's its own.

    A view is valid until its thread asks for the same slot again.

    Args:
        dtype: Of the views.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self._dtype, self._own = dtype, threading.local()

    def take(self, *shape: int, slot: str = "") -> Tensor:
        """Return an uninitialised tensor of this shape; tensors that live side by side need slots of their own."""
        size = math.prod(shape)
        buffers: dict[str, Tensor] = self._own.__dict__
        if slot not in buffers or buffers[slot].numel() < size:
            buffers[slot] = torch.empty(size, dtype=self._dtype)
        return buffers[slot][:size].view(shape)
