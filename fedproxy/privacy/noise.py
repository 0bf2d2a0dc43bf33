"""Noise that nobody can foresee: Gaussian draws and Poisson samples from ChaCha20 under a secret key.

PyTorch's CPU generator takes 32 bits of its seed: whoever knows what noise hides to a few digits can try them all.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedproxy.errors import ConfigError

KEY_BYTES = 32
_PAIRS = 1 << 20
"""Normal numbers that are drawn at once are twice as many: their float64 steps then take 16 MiB."""
_BLOCK = 64
"""Bytes that ChaCha20 makes at once."""
_GRID_BITS = 20
"""A noised value is rounded to the noise's scale over 2^20, which hides the low bits of its float64 sum."""


class SecretStream:
    """Random draws that depend on a key and on a purpose, each new.

    Args:
        secret: 32 bytes that the client alone knows.
        purpose: What is drawn for; other purposes give independent draws.
    """

    def __init__(self, secret: bytes, *purpose: str) -> None:
        self._key = derived_key(secret, "noise", *purpose)
        self._draws = 0

    def words(self, count: int) -> "np.ndarray[Any, np.dtype[np.uint64]]":
        """Return new uniform 64-bit words."""
        stream = Stream(self._key, self._draws)
        self._draws += 1
        return np.frombuffer(stream.next(8 * count), dtype="<u8")

    def normal(self, count: int) -> Tensor:
        """Return standard normal numbers, float64 (count), by Box and Muller (1958)."""
        parts = []
        for done in range(0, count, 2 * _PAIRS):
            pairs = min(_PAIRS, -(-(count - done) // 2))
            # The upper 53 bits, as numbers in (0, 1).
            uniform = torch.from_numpy(((self.words(2 * pairs) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53)
            radius, angle = uniform[:pairs].log_().mul_(-2).sqrt_(), uniform[pairs:].mul_(2 * math.pi)
            parts += [torch.cos(angle).mul_(radius), angle.sin_().mul_(radius)]
        return torch.cat(parts)[:count] if parts else torch.zeros(0, dtype=torch.float64)

    def chosen(self, count: int, rate: float) -> Tensor:
        """Return which of ``count`` units a Poisson sample takes, each with chance ``rate``, as indices."""
        if rate >= 1:
            return torch.arange(count)
        taken = self.words(count) < np.uint64(int(rate * 2.0**64))
        return torch.from_numpy(np.flatnonzero(taken))


def noised(tensors: Mapping[str, Tensor], scale: float, stream: SecretStream) -> dict[str, Tensor]:
    """Return tensors with Gaussian noise of standard deviation ``scale``, in their dtypes.

    Sums are taken in float64 and rounded to a grid of ``scale`` / 2^20, so that their last bits, from which noise of
    floating-point numbers can be told (Mironov 2012), do not leave.

    Args:
        tensors: By name; draws are in sorted order of names.
        scale: At least 0; 0 returns the tensors as they are.
        stream: Where the noise comes from.
    """
    if scale == 0:
        return dict(tensors)
    grid = 2.0 ** (math.floor(math.log2(scale)) - _GRID_BITS)
    result = {}
    for name in sorted(tensors):
        tensor = tensors[name]
        total = stream.normal(tensor.numel()).mul_(scale).view(tensor.shape).add_(tensor.cpu())
        result[name] = total.div_(grid).round_().mul_(grid).to(tensor.dtype).to(tensor.device)
    return result


def derived_key(secret: bytes, *purpose: str) -> bytes:
    """Return a key of 32 bytes for one purpose, by HKDF-SHA256 (RFC 5869)."""
    hashes, hkdf = _primitives("hashes"), _primitives("kdf.hkdf")
    info = b"".join(len(part.encode()).to_bytes(4, "little") + part.encode() for part in ("fedproxy", *purpose))
    key: bytes = hkdf.HKDF(hashes.SHA256(), KEY_BYTES, salt=None, info=info).derive(secret)
    return key


class Stream:
    """ChaCha20's key stream, byte after byte.

    Args:
        key: 32 bytes.
        number: Which of the key's streams; no two have a byte in common.
        start: Where in the stream to begin, in bytes, below 2^38.
    """

    def __init__(self, key: bytes, number: int = 0, start: int = 0) -> None:
        ciphers = _primitives("ciphers")
        blocks, rest = divmod(start, _BLOCK)
        nonce = blocks.to_bytes(8, "little") + number.to_bytes(8, "little")
        self._encryptor = ciphers.Cipher(ciphers.algorithms.ChaCha20(key, nonce), mode=None).encryptor()
        self._zeros = self._buffer = bytearray()
        self.next(rest)

    def next(self, count: int) -> memoryview:
        """Return the next ``count`` bytes, of a buffer that the next call overwrites."""
        if len(self._buffer) < count:
            self._zeros, self._buffer = bytearray(count), bytearray(count)
        self._encryptor.update_into(memoryview(self._zeros)[:count], self._buffer)
        return memoryview(self._buffer)[:count]


def _primitives(name: str) -> Any:
    import importlib

    try:
        module = importlib.import_module(f"cryptography.hazmat.primitives.{name}")
    except ImportError as error:
        raise ConfigError("privacy needs the package cryptography; run pip install 'fedproxy[privacy]'") from error
    return module
