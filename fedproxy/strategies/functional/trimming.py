"""Exact top-k by magnitude over tensors that come one block at a time.

A top-k keeps ``floor(density * size + 1e-9)`` coordinates; among equal magnitudes the earlier coordinate wins.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fedproxy.strategies.functional.scratch import Scratch

_KEEP_NONE = math.inf
GATHER_LIMIT = 1 << 26
"""Coordinates up to which a top-k gathers a client's whole update (256 MB) instead of reading it twice."""


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


def find_threshold(
    read: Callable[[], Iterable[Tensor]], size: int, count: int, *, scratch: Scratch | None = None
) -> Threshold:
    """Find the exact cut that keeps the ``count`` largest magnitudes of a stream.

    Magnitudes are compared as the integers that their float32 bits are, which have the same order. Streams of up to
    ``GATHER_LIMIT`` coordinates are gathered and partitioned; longer ones are read twice in constant memory, once for a
    histogram of the upper bits and once for one of the lower bits within the bin that holds the cut.

    Args:
        read: Starts the stream: float32 tensors of any shape, in order.
        size: Coordinates in the stream.
        count: Coordinates to keep.
        scratch: Memory to work in.

    Returns:
        The cut.
    """
    if count <= 0:
        return Threshold(_KEEP_NONE, None)
    if count >= size:
        return Threshold(0.0, None)
    if size > GATHER_LIMIT:
        return _by_histogram(read, count)
    magnitudes = (scratch or Scratch()).take(size)
    start = 0
    for tensor in read():
        torch.abs(tensor.reshape(-1), out=magnitudes[start : start + tensor.numel()])
        start += tensor.numel()
    bits = magnitudes.view(torch.int32)
    bits.numpy().partition(size - count)
    dropped, cut = bits[: size - count], bits[size - count].clone()
    surplus = bool(dropped.max() == cut) and bool(cut != 0)
    ties = int((bits[size - count :] == cut).sum()) if surplus else None
    return Threshold(float(cut.view(torch.float32)), ties)


def _by_histogram(read: Callable[[], Iterable[Tensor]], count: int) -> Threshold:
    upper = torch.zeros(1 << 15, dtype=torch.int64)
    for tensor in read():
        upper += torch.bincount(_bits(tensor) >> 16, minlength=len(upper))
    high, left = _bin_of(upper, count)
    lower = torch.zeros(1 << 16, dtype=torch.int64)
    for tensor in read():
        bits = _bits(tensor)
        lower += torch.bincount(bits[(bits >> 16) == high] & 0xFFFF, minlength=len(lower))
    low, ties = _bin_of(lower, left)
    cut = torch.tensor(high << 16 | low, dtype=torch.int32)
    surplus = ties < int(lower[low]) and int(cut) != 0
    return Threshold(float(cut.view(torch.float32)), ties if surplus else None)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).abs().view(torch.int32)


def _bin_of(histogram: Tensor, count: int) -> tuple[int, int]:
    """Return the bin that holds the ``count``-th largest entry, and how many entries of that bin are among them."""
    above = histogram.flip(0).cumsum(0)
    place = int((above < count).sum())
    chosen = len(histogram) - 1 - place
    return chosen, count - int(above[place] - histogram[chosen])


class Trimmer:
    """Zeroes what each client's top-k drops; blocks must come in stream order, each once.

    Args:
        thresholds: One cut per client.
    """

    def __init__(self, thresholds: Iterable[Threshold]) -> None:
        self._cuts = tuple(thresholds)
        # hardshrink keeps what is larger than its bound, so the bound is the number just below the cut.
        self._below = [_next_below(cut.magnitude) for cut in self._cuts]
        self._ties = {k: cut.ties for k, cut in enumerate(self._cuts) if cut.ties is not None}

    def trim_(self, deltas: Tensor) -> Tensor:
        """Zero in place what the next block loses, and return it.

        Args:
            deltas: float32 (clients, n), the next n coordinates.
        """
        if all(cut.magnitude == 0.0 for cut in self._cuts):
            return deltas
        bounds = tuple(self._below)
        for client, left in tuple(self._ties.items()):
            equal = deltas[client].abs() == self._cuts[client].magnitude
            found = int(equal.sum())
            if found > left:
                deltas[client][equal & (equal.cumsum(0) > left)] = 0.0
            self._ties[client] = left - found
            if found >= left:  # from here on all that equals the cut goes
                del self._ties[client]
                self._below[client] = self._cuts[client].magnitude
        for row, bound in zip(deltas, bounds, strict=True):
            if bound > 0.0:
                torch.nn.functional.hardshrink(row, bound, out=row)
        return deltas


def _next_below(magnitude: float) -> float:
    if magnitude in (0.0, _KEEP_NONE):
        return magnitude
    return float(torch.nextafter(torch.tensor(magnitude), torch.tensor(0.0)))


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
    upto, outliers = (
        Trimmer([find_threshold(partial(iter, [row]), size, min(size, kept)) for row in flat]).trim_(flat.clone())
        for kept in (skip + count, skip)
    )
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
