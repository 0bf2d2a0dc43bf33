"""Exact top-k by magnitude over tensors that come one block at a time.

A top-k keeps ``floor(density * size + 1e-9)`` coordinates; among equal magnitudes the earlier coordinate wins.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

_KEEP_NONE = math.inf


def top_count(density: float, size: int) -> int:
    """Return how many of ``size`` coordinates a top-k of this density keeps."""
    return min(size, math.floor(density * size + 1e-9))


@dataclass(frozen=True)
class Threshold:
    """Where a top-k cuts: everything above ``magnitude`` stays, and the first ``ties`` coordinates equal to it."""

    magnitude: float
    """Smallest kept magnitude; 0 keeps everything, inf nothing."""
    ties: int | None
    """Coordinates of exactly this magnitude that stay, in order; None keeps them all."""


def find_threshold(tensors: Iterable[Tensor], size: int, count: int) -> Threshold:
    """Find the exact cut that keeps the ``count`` largest magnitudes of a stream.

    Magnitudes are compared as the integers that their float32 bits are, which have the same order.

    Args:
        tensors: The stream, in order; float32 of any shape.
        size: Coordinates in the stream.
        count: Coordinates to keep.

    Returns:
        The cut; extra memory is 4 bytes per coordinate.
    """
    if count <= 0:
        return Threshold(_KEEP_NONE, None)
    if count >= size:
        return Threshold(0.0, None)
    magnitudes = torch.empty(size, dtype=torch.float32)
    start = 0
    for tensor in tensors:
        torch.abs(tensor.reshape(-1), out=magnitudes[start : start + tensor.numel()])
        start += tensor.numel()
    bits = magnitudes.view(torch.int32)
    bits.numpy().partition(size - count)
    cut = bits[size - count].clone()
    above = int((bits[size - count :] > cut).sum())
    equal = int((bits == cut).sum())
    ties = count - above
    return Threshold(float(cut.view(torch.float32)), None if ties == equal or cut == 0 else ties)


class Trimmer:
    """Zeroes what each client's top-k drops; blocks must come in stream order, each once.

    Args:
        thresholds: One cut per client.
    """

    def __init__(self, thresholds: Iterable[Threshold]) -> None:
        cuts = tuple(thresholds)
        self._cuts = torch.tensor([cut.magnitude for cut in cuts], dtype=torch.float32).unsqueeze(1)
        self._ties = {k: cut.ties for k, cut in enumerate(cuts) if cut.ties is not None}
        self._keeps_all = all(cut.magnitude == 0.0 for cut in cuts)

    def __call__(self, deltas: Tensor) -> Tensor:
        """Return the trimmed block.

        Args:
            deltas: float32 (clients, n), the next n coordinates.

        Returns:
            float32 (clients, n); the input itself where nothing is dropped.
        """
        if self._keeps_all:
            return deltas
        magnitudes = deltas.abs()
        keep = magnitudes >= self._cuts
        for client, left in self._ties.items():
            equal = magnitudes[client] == self._cuts[client]
            found = int(equal.sum())
            if found > left:
                keep[client] &= ~equal | (equal.cumsum(0) <= left)
            self._ties[client] = max(0, left - found)
        return torch.where(keep, deltas, 0.0)


def magnitude_window(deltas: Tensor, skip: int, count: int) -> Tensor:
    """Zero each client's ``skip`` largest magnitudes and all below the next ``count``; ties to the lower index.

    Args:
        deltas: float32 (clients, *shape), one tensor of all clients.
        skip: Outliers to drop.
        count: Coordinates to keep after them.

    Returns:
        float32 (clients, *shape).
    """
    flat = deltas.reshape(len(deltas), -1)
    size = flat.shape[1]
    upto = Trimmer([find_threshold([row], size, min(size, skip + count)) for row in flat])(flat)
    outliers = Trimmer([find_threshold([row], size, skip) for row in flat])(flat)
    return torch.where(outliers == 0, upto, 0.0).view(deltas.shape)


def keep_probabilities(deltas: Tensor, *, density: float, window: float) -> Tensor:
    """Return DELLA's keep probabilities: linear in the rank of the magnitude within each row.

    Args:
        deltas: float32 (clients, *shape); a row is the last dimension, a tensor of one dimension is one row.
        density: Mean probability.
        window: Probability of the largest minus that of the smallest magnitude.
            Choice: a row of one entry has the mean.

    Returns:
        float32 (clients, *shape).
    """
    rows = deltas if deltas.dim() > 1 else deltas.unsqueeze(1)
    ranks = rows.abs().argsort(dim=-1, stable=True).argsort(dim=-1).float()
    last = rows.shape[-1] - 1
    share = ranks / last if last > 0 else torch.full_like(ranks, 0.5)
    return (density + window * (share - 0.5)).view(deltas.shape)
