"""Fewer bits per value: int8 with one scale per block of values, and levels of few bits packed into bytes."""

import torch
from torch import Tensor

BLOCK = 64
"""Values that share one scale: a float32 scale adds 1/16 to a byte per value."""
_LARGEST_CODE = 127
_CHUNK = 1 << 20
"""Codes that are packed at a time, a multiple of 8: bounds the memory that their bits take."""


def quantise(values: Tensor, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Round values to int8, symmetrically around 0, with the largest magnitude of every block as 127.

    Args:
        values: float32, any shape, finite.
        block: Values that share one scale, in row-major order; the last block may be shorter.

    Returns:
        Codes, int8 (n,), and scales, float32 (ceil(n / block),): a value is its code times its block's scale, and no
        further from the true one than half a scale. A block of zeros has scale 0.
    """
    flat = values.detach().reshape(-1).float()
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % block)).view(-1, block)
    scales = padded.abs().amax(dim=1) / _LARGEST_CODE
    # The scale of a block is 0 where its largest value is 0, or too small to be divided: its values become 0.
    codes = (padded / scales.where(scales > 0, torch.ones(()))[:, None]).round_().clamp_(-_LARGEST_CODE, _LARGEST_CODE)
    return codes.mul_((scales > 0)[:, None]).to(torch.int8).view(-1)[: len(flat)].clone(), scales


def dequantise(codes: Tensor, scales: Tensor, shape: tuple[int, ...], block: int = BLOCK) -> Tensor:
    """Return the values that :func:`quantise` rounded to, float32 in ``shape``."""
    padded = torch.nn.functional.pad(codes.float(), (0, -len(codes) % block)).view(-1, block)
    return (padded * scales[:, None]).view(-1)[: len(codes)].reshape(shape)


def bits_for(levels: int) -> int:
    """Return how many bits tell ``levels`` values apart, at least 1."""
    return max(1, (levels - 1).bit_length())


def packed_bytes(count: int, bits: int) -> int:
    """Return how many bytes :func:`pack` makes of ``count`` codes."""
    return -(-count * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack whole numbers into as few bytes as they need: code i fills bits [i b, (i + 1) b), lowest first.

    Args:
        codes: uint8 or int16 (n,), each below 2 ** bits.
        bits: Bits per code, 1 to 15.

    Returns:
        uint8 (ceil(n bits / 8),).
    """
    places = torch.arange(bits, dtype=codes.dtype)
    worth = 2 ** torch.arange(8, dtype=torch.uint8)
    parts = []
    for chunk in torch.split(codes, _CHUNK):
        stream = ((chunk[:, None] >> places) & 1).to(torch.uint8).view(-1)
        stream = torch.nn.functional.pad(stream, (0, -len(stream) % 8)).view(-1, 8)
        parts.append((stream * worth).sum(dim=1, dtype=torch.uint8))
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return the ``count`` codes that :func:`pack` packed: uint8 (count,), int16 where they have more than 8 bits."""
    places, dtype = torch.arange(8, dtype=torch.uint8), _holds(bits)
    worth = 2 ** torch.arange(bits, dtype=dtype)
    parts = []
    for chunk in torch.split(packed, _CHUNK // 8 * bits):
        stream = ((chunk[:, None] >> places) & 1).view(-1)
        whole = len(stream) // bits * bits
        parts.append((stream[:whole].view(-1, bits) * worth).sum(dim=1, dtype=dtype))
    return torch.cat(parts)[:count] if parts else torch.zeros(0, dtype=dtype)


def _holds(bits: int) -> torch.dtype:
    return torch.uint8 if bits <= 8 else torch.int16


def conflict_levels(clients: int) -> int:
    """Return how many values C (FedProxy Eq 7) of ``clients`` that all moved has: |sum of signs| is K, K - 2, ..."""
    return clients // 2 + 1


def conflict_codes(conflict: Tensor, clients: int) -> Tensor:
    """Return the number of each coordinate's level, from full agreement (0) to the most conflict.

    Choice: where a client did not move, |sum of signs| lies between two levels; that client counts as agreeing, so that
    C is 1 / K less than it was.

    Args:
        conflict: float32, C = 1 - |n| / K.
        clients: K, below 2 ** 15.

    Returns:
        uint8 (n,), row-major; int16 where they have more than 8 bits.
    """
    against = (conflict.reshape(-1) * clients).round_()  # K - |n|: 0, 2, 4, ... where all moved
    return against.div_(2, rounding_mode="floor").to(_holds(bits_for(conflict_levels(clients))))


def conflict_of(codes: Tensor, clients: int, shape: tuple[int, ...]) -> Tensor:
    """Return C in [0, 1] of levels, float32 in ``shape``, with the bits that aggregation gives it."""
    return (clients - 2 * codes.float()).mul_(-1.0 / clients).add_(1.0).reshape(shape)
