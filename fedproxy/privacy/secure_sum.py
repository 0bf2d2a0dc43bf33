"""Sums of which nobody sees a part: fixed-point numbers under pairwise masks that cancel.

Bonawitz et al. 2017 (doi 10.1145/3133956.3133982) without their recovery of missing clients: where one is missing the
sum is void, and is taken again without it. Client i sends

    y_i = x_i + sum_{j > i} m_ij - sum_{j < i} m_ij   (mod 2^32)

with m_ij the ChaCha20 key stream under the key that i and j alone have; the masks of all clients add up to nothing, and
y_i by itself is uniform.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fedproxy.errors import ClientError
from fedproxy.privacy.noise import Stream
from fedproxy.protocol import Tensors

Numbers = np.ndarray[Any, np.dtype[Any]]
T = TypeVar("T")
R = TypeVar("R")
_CHUNK = 1 << 18
"""Numbers that are rounded or masked at once: 1 MiB stays in a core's cache."""
_SHARE = 1 << 22
"""Numbers that a thread takes at a time."""


def step_of(largest: float, clients: int) -> float:
    """Return the step of the fixed-point numbers: the sum of ``clients`` numbers up to ``largest`` has 31 bits.

    A sum is then wrong by at most ``clients`` / 2 steps.
    """
    return 2.0 ** math.ceil(math.log2(largest * clients / (2**31 - clients)))


def unit_of(largest: float) -> float:
    """Return what stands for 1 where weights or counts are added up: the highest power of two up to ``largest``.

    Fixed-point numbers hold it exactly, whatever ``largest`` is.
    """
    return 2.0 ** math.floor(math.log2(largest))


def encode(tensors: Tensors, largest: float, clients: int) -> dict[str, Tensor]:
    """Return numbers as fixed point, int32 in their shapes.

    Args:
        tensors: float32 by name.
        largest: Largest magnitude of a number.
        clients: How many clients' numbers are added up.

    Raises:
        ClientError: If a number is larger, or not finite.
    """
    scale, found = np.float32(1 / step_of(largest, clients)), {}
    for name in sorted(tensors):
        flat = tensors[name].detach().float().cpu().reshape(-1)
        codes = torch.empty(len(flat), dtype=torch.int32)
        shares = list(zip(_split(flat.numpy()), _split(codes.numpy()), strict=True))
        most = max(_in_threads(lambda share: _round(share[0], share[1], scale), shares), key=_rank, default=0.0)
        if not most <= largest:  # NaN too
            raise ClientError(
                f"tensor {name!r} has a magnitude of {most:.3g}, and a secure sum takes at most {largest:g}; raise "
                "privacy.largest or lower client.lr"
            )
        found[name] = codes.view(tensors[name].shape)
    return found


def _round(numbers: Numbers, codes: Numbers, scale: np.float32) -> float:
    """Write numbers as fixed point, and return the largest magnitude among them: NaN if one is that."""
    buffer, most = np.empty(min(len(numbers), _CHUNK), np.float32), 0.0
    for start in range(0, len(numbers), _CHUNK):
        part = numbers[start : start + _CHUNK]
        scaled = np.multiply(part, scale, out=buffer[: len(part)])
        most = max(most, float(part.max()), -float(part.min()), key=_rank)
        with np.errstate(invalid="ignore"):  # what has no code is refused
            codes[start : start + _CHUNK] = np.rint(scaled, out=scaled)
    return most


def _rank(magnitude: float) -> float:
    return math.inf if math.isnan(magnitude) else magnitude


def _split(numbers: Numbers) -> list[Numbers]:
    return [numbers[start : start + _SHARE] for start in range(0, len(numbers), _SHARE)]


def _in_threads(work: Callable[[T], R], shares: Sequence[T]) -> list[R]:
    """Do independent work; ours, since PyTorch's threads wait for each other after every operation."""
    if len(shares) < 2:
        return list(map(work, shares))
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return list(pool.map(work, shares))


def decode(total: Mapping[str, Tensor], largest: float, clients: int) -> dict[str, Tensor]:
    """Return the float32 numbers of a sum of fixed-point ones."""
    step = step_of(largest, clients)
    return {name: tensor.double().mul_(step).float() for name, tensor in total.items()}


def masked(values: Mapping[str, Tensor], own: str, keys: Mapping[str, bytes]) -> dict[str, Tensor]:
    """Put a client's numbers under its masks, in place, and return them.

    Args:
        values: int32 by name, contiguous.
        own: The client.
        keys: By every other client of the sum, the key that both have.

    Raises:
        ClientError: If there is nobody to be hidden among.
    """
    if not keys:
        raise ClientError("a secure sum of one client hides nothing; take part with others")
    shares = [part for name in sorted(values) for part in _split(values[name].view(-1).numpy().view(np.uint32))]
    offsets = accumulate(map(len, shares), initial=0)
    _in_threads(lambda share: _mask(share[0], share[1], own, keys), list(zip(shares, offsets, strict=False)))
    return dict(values)


def _mask(numbers: Numbers, offset: int, own: str, keys: Mapping[str, bytes]) -> None:
    """Put numbers under the masks that begin at number ``offset`` of their streams, in place."""
    streams = [(Stream(key, start=4 * offset), np.add if own < other else np.subtract) for other, key in keys.items()]
    for start in range(0, len(numbers), _CHUNK):
        part = numbers[start : start + _CHUNK]
        for stream, put in streams:
            put(part, np.frombuffer(stream.next(4 * len(part)), dtype="<u4"), out=part)


def added(updates: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the sum of masked numbers modulo 2^32: that of the numbers, once all clients' masks are in it."""
    total = {name: updates[0][name].clone() for name in sorted(updates[0])}
    for update in updates[1:]:
        for name, tensor in total.items():
            tensor.add_(update[name])  # int32 wraps
    return total
