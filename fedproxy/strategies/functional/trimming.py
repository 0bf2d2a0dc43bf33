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


def top_share(values: Tensor, density: float) -> Tensor:
    """Return the values (n,) with all but the largest magnitudes set to zero: what a top-k is, in one sort."""
    order = values.abs().argsort(descending=True, stable=True)
    kept = torch.zeros_like(values, dtype=torch.bool)
    kept[order[: top_count(density, len(values))]] = True
    return values.where(kept, torch.zeros_like(values))


@dataclass(frozen=True)
class Threshold:
    """Where a top-k cuts: everything above ``magnitude`` stays, and the first ``ties`` coordinates equal to it."""

    magnitude: float
    """Smallest kept magnitude; 0 keeps everything, inf nothing."""
    ties: int | None
    """Coordinates of exactly this magnitude that stay, in order; None keeps them all."""


Stream = Callable[[], Iterable[Tensor]]
"""Starts a stream: float32 tensors of any shape, in order."""
Found = tuple[int, list[NDArray[np.float32]]]
"""How many magnitudes reach a bracket's upper end, and those strictly within the bracket."""


def find_threshold(read: Stream, size: int, count: int) -> Threshold:
    """Find the exact cut that keeps the ``count`` largest magnitudes of a stream.

    A regular sample of the stream brackets the cut, one pass counts what lies above the bracket and gathers what lies
    within it, and the cut is selected among those few. Where the sample misleads (periodic streams) or many coordinates
    share one magnitude, two passes of a radix selection over the float32 bits find it instead. Both are exact and take
    little memory.

    Args:
        read: Starts the stream.
        size: Coordinates in the stream.
        count: Coordinates to keep.

    Returns:
        The cut.
    """
    bracket = bracket_cut(read, size, count)
    return settle_cut(read, size, count, [] if bracket is None else [gather(read(), bracket)])


def bracket_cut(read: Stream, size: int, count: int) -> tuple[float, float] | None:
    """Return magnitudes between which the cut lies, all but surely: four standard deviations of the sample's rank.

    None stands for a cut that keeps everything or nothing.
    """
    if not 0 < count < size:
        return None
    step, position, filled = max(1, size // _SAMPLE), 0, 0
    looked_at = torch.empty(-(-size // step))
    for tensor in read():
        flat = tensor.reshape(-1)
        picked = flat[-position % step :: step]
        looked_at[filled : filled + len(picked)] = picked
        filled, position = filled + len(picked), position + len(flat)
    sample = looked_at.abs_().numpy()
    share, total = count / size, len(sample)
    margin = 4.0 * math.sqrt(total * share * (1.0 - share)) + 2.0
    first, last = math.floor((1.0 - share) * total - margin), math.ceil((1.0 - share) * total + margin)
    sample.partition([max(first, 0), min(last, total - 1)])
    return float(sample[first]) if first >= 0 else 0.0, float(sample[last]) if last < total else math.inf


def gather(tensors: Iterable[Tensor], bracket: tuple[float, float]) -> Found:
    """Look through part of a stream for a cut within ``bracket``."""
    low, high = bracket
    magnitudes = np.empty(_PIECE, np.float32)
    reaching, above_low = np.empty(_PIECE, np.bool_), np.empty(_PIECE, np.bool_)
    above, within = 0, []
    for tensor in tensors:
        for piece in torch.split(tensor.reshape(-1), _PIECE):
            n = len(piece)
            values = np.abs(piece.numpy(), out=magnitudes[:n])
            np.greater_equal(values, high, out=reaching[:n])
            np.greater(values, low, out=above_low[:n])
            above += int(np.count_nonzero(reaching[:n]))
            within.append(values.compress(np.greater(above_low[:n], reaching[:n], out=above_low[:n])))
    return above, within


def settle_cut(read: Stream, size: int, count: int, found: Iterable[Found]) -> Threshold:
    """Return the cut from what all parts of a stream hold of its bracket; read the stream where that is not enough."""
    if count <= 0:
        return Threshold(_KEEP_NONE, None)
    if count >= size:
        return Threshold(0.0, None)
    parts = list(found)
    above = sum(part for part, _ in parts)
    within = np.concatenate([piece for _, pieces in parts for piece in pieces])
    if not above < count <= above + len(within):
        return _by_histogram(read, count)
    place = len(within) - (count - above)
    within.view(np.int32).partition(place)  # magnitudes are ordered as the integers that their bits are
    cut, dropped = within[place], within[:place]
    ties = int((within[place:] == cut).sum()) if bool((dropped == cut).any()) else None
    return Threshold(float(cut), ties)


def _by_histogram(read: Stream, count: int) -> Threshold:
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
        self._below = [cut.magnitude if cut.ties == 0 else _next_below(cut.magnitude) for cut in self._cuts]
        self._ties = {k: cut.ties for k, cut in enumerate(self._cuts) if cut.ties}

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
    return torch.where(largest(flat, skip) == 0, largest(flat, skip + count), 0.0).view(deltas.shape)


def largest(rows: Tensor, count: int) -> Tensor:
    """Return rows, float32 (clients, n), with all but each one's ``count`` largest magnitudes set to zero.

    It is :func:`top_share` by a count, without a sort.
    """
    cuts = [find_threshold(partial(iter, [row]), len(row), count) for row in rows]
    return Trimmer(cuts).trim(tuple(rows), torch.empty_like(rows))
