"""What all compressors that remove whole blocks share: how many go, and blocks kept by hand."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fedproxy.errors import ConfigError, ModelError
from fedproxy.models import Decoder
from fedproxy.models.block_fields import rhythm
from fedproxy.models.decoder import parameter_count
from fedproxy.models.needs import complete, in_step, known_needs, possible_needs
from fedproxy.strategies.compression.base import Batch, Compressor, require_removal


@dataclass(frozen=True)
class BlockRemoval(Compressor):
    """Removes whole blocks; a member says which (:meth:`choose`), from scores (:meth:`measure`) where it needs any."""

    ratio: float = 0.5
    """Share removed, in [0, 1): nothing, or at least one block; of blocks: keep = max(1, L - floor(L * ratio))."""
    ratio_of: Literal["blocks", "parameters"] = "blocks"
    """What ``ratio`` counts: blocks, or the target's parameters (as many whole blocks as they hold)."""
    keep: tuple[int, ...] | None = None
    """Ascending indices of the blocks to keep, instead of ``ratio`` and of any score; null chooses by score."""

    def __post_init__(self) -> None:
        """Check the options; ``keep`` becomes a tuple."""
        self.require("ratio", 0.0 <= self.ratio < 1.0, "in [0, 1)")
        self.require("ratio_of", self.ratio_of in ("blocks", "parameters"), "blocks or parameters")
        if self.keep is not None:
            object.__setattr__(self, "keep", tuple(self.keep))
            ascending = all(left < right for left, right in zip(self.keep, self.keep[1:], strict=False))
            ok = bool(self.keep) and ascending and self.keep[0] >= 0
            self.require("keep", ok, "ascending block indices from 0 without repeats")

    def places(self, decoder: Decoder) -> Sequence[int]:
        """Return as many blocks as will stay; those themselves where they are known without scores.

        Raises:
            ConfigError: If the options do not fit the target.
            ModelError: If no proxy can be made of so many of the target's blocks.
        """
        first: ModelError | None = None
        for kept in self.ways(decoder, tuple(self.likely(decoder)), None):
            try:
                decoder.subset_config(kept)
            except ModelError as error:
                first = first or error
            else:
                return kept
        assert first is not None
        raise first

    def likely(self, decoder: Decoder) -> Sequence[int]:
        """Return a selection of the right size, made without scores; what ``keep`` names where it names any."""
        count = self.kept_count(decoder)
        return self.arranged(self.keep or tuple(range(count)), len(decoder))

    def kept_count(self, decoder: Decoder) -> int:
        """Return how many blocks stay.

        Raises:
            ConfigError: If ``keep`` names a block that the target has not, or all blocks would go, or none.
        """
        depth = len(decoder)
        if self.keep is not None:
            if self.keep[-1] >= depth:
                raise ConfigError(
                    f"compression.keep names block {self.keep[-1]}, but the target has blocks 0 to {depth - 1}"
                )
            return len(self.keep)
        if self.ratio_of == "blocks":
            count = keep_count(depth, self.ratio)
            require_removal(depth - count, self.ratio, 1 / depth, "block")
            return count
        total, blocks = parameter_count(decoder.model), parameter_count(decoder.blocks)
        removed = int(self.ratio * total * depth / blocks + 1e-9)
        if removed >= depth:
            raise ConfigError(
                f"compression.ratio={self.ratio} of the parameters would remove all {depth} blocks, which hold "
                f"{blocks / total:.3f} of them; give less"
            )
        require_removal(removed, self.ratio, blocks / depth / total, "block")
        return depth - removed

    def score(self, decoder: Decoder, calibration: Iterable[Batch]) -> Tensor | None:
        """Return the member's scores, or None where no block goes or ``keep`` says which stay."""
        if self.keep is not None or self.kept_count(decoder) == len(decoder):
            return None
        return self.measure(decoder, calibration)

    def select(self, decoder: Decoder, scores: Tensor | None) -> Sequence[int]:
        """Return the indices that the proxy keeps, ascending."""
        count, depth = self.kept_count(decoder), len(decoder)
        if self.keep is not None:
            return self.keep
        return range(depth) if count == depth else self.choose(depth, count, scores)

    def choices(self, decoder: Decoder, scores: Tensor | None) -> Iterator[tuple[int, ...]]:
        """Yield the selection, with the blocks that its own need, and then with what the family may need besides."""
        worth = self.block_scores(len(decoder), scores)
        return self.ways(decoder, tuple(self.select(decoder, scores)), worth)

    def ways(self, decoder: Decoder, chosen: tuple[int, ...], worth: Tensor | None) -> Iterator[tuple[int, ...]]:
        """Yield selections of equally many blocks, closest to ``chosen``, that a family may accept where it does not.

        Blocks that ``keep`` names are taken as they are.
        """
        depth, kept = len(decoder), sorted(set(chosen))
        if self.keep is not None or len(kept) == depth:
            yield chosen
            return
        known = known_needs(decoder)
        for needs in ((), *possible_needs(decoder)):
            completed = complete(kept, (*known, *needs), depth, worth)
            yield chosen if completed == tuple(kept) else self.arranged(completed, depth)
        period = rhythm(decoder.model.config.get_text_config())
        if period > 1:
            yield self.arranged(in_step(kept, period, depth, worth), depth)

    def arranged(self, kept: tuple[int, ...], depth: int) -> tuple[int, ...]:
        """Return the target's block behind each of the proxy's, of blocks that stay; for a member that repeats some."""
        return kept

    def measure(self, decoder: Decoder, calibration: Iterable[Batch]) -> Tensor | None:
        """Return scores, float64 on the CPU; None for a member that needs none."""
        return None

    @abstractmethod
    def choose(self, depth: int, count: int, scores: Tensor | None) -> Sequence[int]:
        """Return the ``count`` of ``depth`` blocks that stay, ascending; ``count`` < ``depth``."""


def keep_count(depth: int, ratio: float) -> int:
    """Return how many of ``depth`` blocks stay when the share ``ratio`` is deleted: at least one."""
    return max(1, depth - int(depth * ratio + 1e-9))


def kept_blocks(scores: Tensor, deleted: int) -> tuple[int, ...]:
    """Return the indices that stay, ascending, when the ``deleted`` lowest scores go; ties delete the lower index.

    Args:
        scores: (blocks,).
        deleted: How many go.
    """
    gone = set(scores.sort(stable=True).indices[:deleted].tolist())
    return tuple(i for i in range(len(scores)) if i not in gone)
