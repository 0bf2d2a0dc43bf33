"""Sums of which nobody sees a part: fixed-point numbers under pairwise masks that cancel.

Bonawitz et al. 2017 (doi 10.1145/3133956.3133982) without their recovery of missing clients: where one is missing the
sum is void, and is taken again without it. Client i sends

    y_i = x_i + sum_{j > i} m_ij - sum_{j < i} m_ij   (mod 2^32)

with m_ij the ChaCha20 key stream under the key that i and j alone have; the masks of all clients add up to nothing, and
y_i by itself is uniform.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fedproxy.errors import ClientError
from fedproxy.privacy.noise import keystream
from fedproxy.protocol import Tensors

_CHUNK = 1 << 20
"""Numbers that are masked at once: their masks stay in a core's cache."""
_BLOCK = 64
"""Bytes of a block of ChaCha20."""


def step_of(largest: float, clients: int) -> float:
    """Return the step of the fixed-point numbers: the sum of ``clients`` numbers up to ``largest`` has 31 bits.

    A sum is then wrong by at most ``clients`` / 2 steps.
    """
    return 2.0 ** math.ceil(math.log2(largest * clients / (2**31 - clients)))


def encode(tensors: Tensors, largest: float, clients: int) -> dict[str, Tensor]:
    """Return numbers as fixed point, int32 in their shapes.

    Args:
        tensors: float32 by name.
        largest: Largest magnitude of a number.
        clients: How many clients' numbers are added up.

    Raises:
        ClientError: If a number is larger, or not finite.
    """
    step = step_of(largest, clients)
    found = {}
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu()
        most = float(tensor.abs().max()) if tensor.numel() else 0.0
        if not most <= largest:  # NaN too
            raise ClientError(
                f"tensor {name!r} has a magnitude of {most:.3g}, and a secure sum takes at most {largest:g}; raise "
                "privacy.largest or lower client.lr"
            )
        found[name] = (tensor / step).round_().to(torch.int32)
    return found


def decode(total: Mapping[str, Tensor], largest: float, clients: int) -> dict[str, Tensor]:
    """Return the float32 numbers of a sum of fixed-point ones."""
    step = step_of(largest, clients)
    return {name: tensor.double().mul_(step).float() for name, tensor in total.items()}


def masked(values: Mapping[str, Tensor], own: str, keys: Mapping[str, bytes]) -> dict[str, Tensor]:
    """Return a client's numbers under its masks.

    Args:
        values: int32 by name.
        own: The client.
        keys: By every other client of the sum, the key that both have.

    Raises:
        ClientError: If there is nobody to be hidden among.
    """
    if not keys:
        raise ClientError("a secure sum of one client hides nothing; take part with others")
    result, place = {}, 0
    signs = {other: 1 if own < other else -1 for other in sorted(keys)}
    for name in sorted(values):
        flat = values[name].reshape(-1).clone()
        numbers = flat.numpy().view(np.uint32)
        for start in range(0, len(numbers), _CHUNK):
            part = numbers[start : start + _CHUNK]
            for other, sign in signs.items():
                mask = _mask(keys[other], place, len(part))
                (np.add if sign > 0 else np.subtract)(part, mask, out=part)
            place += -(-4 * len(part) // _BLOCK)
        result[name] = flat.view(values[name].shape)
    return result


def added(updates: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the sum of masked numbers modulo 2^32: that of the numbers, once all clients' masks are in it."""
    total = {name: updates[0][name].clone() for name in sorted(updates[0])}
    for update in updates[1:]:
        for name, tensor in total.items():
            tensor.add_(update[name])  # int32 wraps
    return total


def _mask(key: bytes, block: int, count: int) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint32]]":
    """Return ``count`` uniform 32-bit numbers from the ``block``-th block of a key's stream on."""
    nonce = block.to_bytes(8, "little") + bytes(8)
    return np.frombuffer(keystream(key, nonce, 4 * count), dtype="<u4")
