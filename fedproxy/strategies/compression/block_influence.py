"""Block Influence (FedProxy Eq 4; the score is ShortGPT's, Men et al. 2024, arXiv 2403.03853)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedproxy.errors import ModelError
from fedproxy.models import Decoder
from fedproxy.models.needs import known_needs
from fedproxy.models.skipping import skipping
from fedproxy.strategies.compression.base import Batch
from fedproxy.strategies.compression.removal import BlockRemoval, kept_blocks
from fedproxy.strategies.compression.states import watch_blocks


@dataclass(frozen=True)
class BlockInfluence(BlockRemoval, name="block_influence"):
    """Deletes the blocks that change their input's direction least (Eq 4).

    One-shot ranking: scores are taken once on the whole target. Choice: the first and last block are not forced to
    stay, and of equal scores the block of lower index is deleted first.
    """

    iterative: bool = False
    """Delete one block at a time and score the others again after each (our variant); one pass per block deleted."""

    def measure(self, decoder: Decoder, calibration: Iterable[Batch]) -> Tensor | None:
        """Return every block's influence, (blocks,); with ``iterative`` also, in a second row, the order of removal."""
        if not self.iterative:
            return block_influence(decoder, calibration)
        batches, depth, needs = list(calibration), len(decoder), known_needs(decoder)
        first = block_influence(decoder, batches)
        rank, scores = torch.full_like(first, float(depth)), first
        gone: list[int] = []
        for step in range(depth - self.kept_count(decoder)):
            if gone:
                with skipping(decoder, gone):
                    scores = block_influence(decoder, batches, skipped=gone)
            needed = [i for i in range(depth) if not all(need.met(set(range(depth)) - {*gone, i}) for need in needs)]
            lowest = int(scores.index_fill(0, torch.tensor(needed, dtype=torch.long), torch.inf).argmin())
            rank[lowest] = step
            gone.append(lowest)
        return torch.stack([first, rank])

    def block_scores(self, depth: int, scores: Tensor | None) -> Tensor | None:
        """Return the influences on the whole target."""
        return scores[0] if scores is not None and scores.ndim == 2 else scores

    def choose(self, depth: int, count: int, scores: Tensor | None) -> Sequence[int]:
        """Return the blocks of highest influence, in their order."""
        assert scores is not None
        return kept_blocks(scores[-1] if scores.ndim == 2 else scores, depth - count)


def block_influence(decoder: Decoder, calibration: Iterable[Batch], *, skipped: Sequence[int] = ()) -> Tensor:
    """Return BI_i = 1 - E[cos(X_i, X_{i+1})] over all non-padding tokens (Eq 4), float64 (blocks,).

    Streams through the body without the head: each block's input is compared with its output at once, so that only two
    hidden states are alive at a time. The last block's output is taken before the final norm (Choice: the norm would
    make that block look far more influential than it is).

    Args:
        decoder: The target.
        calibration: Batches of public text.
        skipped: Blocks that are passed over at present; they get the influence infinity.

    Raises:
        DataError: If the calibration text holds no token.
        ModelError: If a hidden state is not finite.
    """
    sums = torch.zeros(len(decoder), dtype=torch.float64, device=decoder.model.device)

    def compare(index: int, before: Tensor, after: Tensor, mask: Tensor) -> None:
        # A third of the seconds of torch's cosine_similarity, which divides whole hidden states by their lengths.
        x, y = before.float(), after.float()
        lengths = torch.linalg.vector_norm(x, dim=-1) * torch.linalg.vector_norm(y, dim=-1)
        cosines = (x * y).sum(dim=-1) / lengths.clamp_min(torch.finfo(torch.float32).tiny)
        sums[index] += cosines.masked_fill(mask == 0, 0.0).sum(dtype=torch.float64)

    tokens = watch_blocks(decoder, calibration, compare)
    influence = 1.0 - sums.cpu() / tokens
    if not bool(influence.isfinite().all()):
        bad = int((~influence.isfinite()).nonzero()[0])
        raise ModelError(f"target: hidden states of block {bad} are not finite; load it in another target.dtype")
    influence[list(skipped)] = torch.inf
    return influence
