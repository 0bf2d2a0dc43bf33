"""Exact top-k by magnitude over tensors that come one block at a time.

A top-k keeps ``floor(density * size + 1e-9)`` coordinates; among equal magnitudes the earlier coordinate wins.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_KEEP_NONE = math.inf
_SAMPLE = 1 << 16  # coordinates looked at to bracket a cut; streams of fewer are looked at whole
_PIECE = 1 << 17  # coordinates of a pass that stay in the cache


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


def find_threshold(read: Callable[[], Iterable[Tensor]], size: int, count: int) -> Threshold:
    """Find the exact cut that keeps the ``count`` largest magnitudes of a stream.

    A regular sample of the stream brackets the cut, one pass counts what lies above the bracket and gathers what lies
    within it, and the cut is selected among those few. Where the sample misleads (periodic streams) or very many
    coordinates share the bracket, two passes of a radix selection over the float32 bits find it instead; both are exact
    and take little memory.

    Args:
        read: Starts the stream: float32 tensors of any shape, in order.
        size: Coordinates in the stream.
        count: Coordinates to keep.

    Returns:
        The cut.
    """
    if count <= 0:
        return Threshold(_KEEP_NONE, None)
    if count >= size:
        return Threshold(0.0, None)
    low, high = _bracket(read, size, count)
    above, within = _gather(read, low, high, limit=max(_SAMPLE, size // 8))
    if within is None or not above < count <= above + len(within):
        return _by_histogram(read, count)
    place = len(within) - (count - above)
    within.partition(place)
    cut, dropped = within[place], within[:place]
    surplus = bool(cut != 0) and bool((dropped == cut).any())
    return Threshold(float(cut), int((within[place:] == cut).sum()) if surplus else None)


def _bracket(read: Callable[[], Iterable[Tensor]], size: int, count: int) -> tuple[float, float]:
    """Return magnitudes between which the cut lies, all but surely: four standard deviations of the sample's rank."""
    step, position, picked = max(1, size // _SAMPLE), 0, []
    for tensor in read():
        flat = tensor.reshape(-1)
        picked.append(flat[-position % step :: step])
        position += flat.numel()
    sample = torch.cat(picked).abs_().numpy()
    share, total = count / size, len(sample)
    margin = 4.0 * math.sqrt(total * share * (1.0 - share)) + 2.0
    first, last = math.floor((1.0 - share) * total - margin), math.ceil((1.0 - share) * total + margin)
    sample.partition([max(first, 0), min(last, total - 1)])
    return float(sample[first]) if first >= 0 else 0.0, float(sample[last]) if last < total else math.inf


def _gather(
    read: Callable[[], Iterable[Tensor]], low: float, high: float, *, limit: int
) -> tuple[int, NDArray[np.float32] | None]:
    """Count the magnitudes above ``high`` and collect those in [low, high]; None where they are more than ``limit``."""
    magnitudes = np.empty(_PIECE, np.float32)
    larger, enough = np.empty(_PIECE, np.bool_), np.empty(_PIECE, np.bool_)
    above, found, within = 0, 0, []
    for tensor in read():
        for piece in torch.split(tensor.reshape(-1), _PIECE):
            n = len(piece)
            values = np.abs(piece.numpy(), out=magnitudes[:n])
            np.greater(values, high, out=larger[:n])
            np.greater_equal(values, low, out=enough[:n])
            above += int(np.count_nonzero(larger[:n]))
            within.append(values[np.not_equal(larger[:n], enough[:n], out=enough[:n])])
            found += len(within[-1])
            if found > limit:
                return above, None
    return above, np.concatenate(within)


def _by_histogram(read: Callable[[], Iterable[Tensor]], count: int) -> Threshold:
    """Select by the upper and then the lower half of the float32 bits, whose integers have the magnitudes' order."""
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
    """Zeroes what each client's top-k drops; parts of a stream must come in its order, each once.

    Args:
        thresholds: One cut per client.
    """

    def __init__(self, thresholds: Iterable[Threshold]) -> None:
        self._cuts = tuple(thresholds)
        # hardshrink keeps what is larger than its bound, so the bound is the number just below the cut.
        self._below = [_next_below(cut.magnitude) for cut in self._cuts]
        self._ties = {k: cut.ties for k, cut in enumerate(self._cuts) if cut.ties is not None}

    def trim(self, rows: Sequence[Tensor], out: Tensor, *, factors: Sequence[float] | None = None) -> Tensor:
        """Write what the next part keeps into ``out``, and return it.

        Args:
            rows: The next n coordinates of every client, float32 (n,); left as they are.
            out: float32 (clients, n).
            factors: Multiply each client's row by its factor.
        """
        for client, (row, kept) in enumerate(zip(rows, out, strict=True)):
            factor = None if factors is None else factors[client]
            if self._below[client] > 0.0:
                torch.nn.functional.hardshrink(row, self._below[client], out=kept)
                if client in self._ties:
                    self._drop_ties(client, row, kept)
                if factor is not None:
                    kept.mul_(factor)
            elif factor is not None:
                torch.mul(row, factor, out=kept)
            else:
                kept.copy_(row)
        return out

    def _drop_ties(self, client: int, row: Tensor, kept: Tensor) -> None:
        left = self._ties[client]
        equal = row.abs() == self._cuts[client].magnitude
        found = int(equal.sum())
        if found > left:
            kept[equal & (equal.cumsum(0) > left)] = 0.0
        self._ties[client] = left - found
        if found >= left:  # from here on all that equals the cut goes
            del self._ties[client]
            self._below[client] = self._cuts[client].magnitude


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
        Trimmer([find_threshold(partial(iter, [row]), size, min(size, kept)) for row in flat]).trim(
            tuple(flat), torch.empty_like(flat)
        )
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
