"""No compression: the proxy is the target itself."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fedproxy.models import Decoder
from fedproxy.strategies.compression.base import Compressor


@dataclass(frozen=True)
class NoCompression(Compressor, name="none"):
    """Keeps every block: clients tune a copy of the target, as centralised tuning does."""

    @property
    def leaves_gaps(self) -> bool:
        """Return that no block is gone."""
        return False

    def select(self, decoder: Decoder, scores: Tensor | None) -> Sequence[int]:
        """Return every block."""
        return range(len(decoder))
