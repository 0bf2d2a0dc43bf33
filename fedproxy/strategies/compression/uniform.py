"""Evenly spaced blocks (Offsite-Tuning's emulator, Xiao et al. 2023, arXiv 2302.04870)."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fedproxy.errors import ConfigError
from fedproxy.models import Decoder
from fedproxy.strategies.compression.removal import BlockRemoval


@dataclass(frozen=True)
class Uniform(BlockRemoval, name="uniform"):
    """Keeps the first and last blocks, and of the n between them m at positions round(i (n - 1) / (m - 1)), i < m.

    ``first: 2, last: 2`` is Offsite-Tuning's split into adapters and emulator; ``first: 0, last: 2`` is FedBiOT's,
    whose adapter is the last blocks alone. ``ratio`` counts all blocks, so that equal ratios remove equally many.
    Choice: halves round to the even position, and m = 1 keeps the middle block, the lower one of two.
    """

    first: int = 2
    """Leading blocks that always stay."""
    last: int = 2
    """Trailing blocks that always stay."""

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        self.require("first", self.first >= 0, "at least 0")
        self.require("last", self.last >= 0, "at least 0")

    def likely(self, decoder: Decoder) -> Sequence[int]:
        """Return the blocks that stay."""
        return self.select(decoder, None)

    def choose(self, depth: int, count: int, scores: Tensor | None) -> Sequence[int]:
        """Return the protected blocks and the evenly spaced ones between them.

        Raises:
            ConfigError: If fewer blocks stay than are protected.
        """
        between, spaced = depth - self.first - self.last, count - self.first - self.last
        if spaced < 0:
            raise ConfigError(
                f"compression.ratio={self.ratio} keeps {count} of {depth} blocks, but compression.first={self.first} "
                f"and compression.last={self.last} protect {self.first + self.last}; remove or protect fewer"
            )
        middle = [self.first + position for position in even_positions(between, spaced)]
        return (*range(self.first), *middle, *range(depth - self.last, depth))


def even_positions(total: int, count: int) -> list[int]:
    """Return ``count`` of ``total`` positions, first and last among them: round(i (total - 1) / (count - 1))."""
    if count == 1:
        return [(total - 1) // 2]
    return [round(i * (total - 1) / (count - 1)) for i in range(count)]
