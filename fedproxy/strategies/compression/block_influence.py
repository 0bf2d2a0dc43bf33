"""Block Influence (FedProxy Eq 4; the score is ShortGPT's, Men et al. 2024, arXiv 2403.03853)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedproxy.errors import DataError, ModelError
from fedproxy.models import Decoder
from fedproxy.models.decoder import hidden_state
from fedproxy.strategies.compression.base import Batch, Compressor


@dataclass(frozen=True)
class BlockInfluence(Compressor, name="block_influence"):
    """Deletes the blocks that change their input's direction least (Eq 4).

    One-shot ranking: scores are taken once on the whole target. Choice: the first and last block are not forced to
    stay, and of equal scores the block of lower index is deleted first.
    """

    ratio: float = 0.5
    """Share of blocks deleted, in [0, 1); keep = max(1, L - floor(L * ratio))."""

    def __post_init__(self) -> None:
        self.require("ratio", 0.0 <= self.ratio < 1.0, "in [0, 1)")

    def score(self, decoder: Decoder, calibration: Iterable[Batch]) -> Tensor | None:
        """Return every block's influence, or None where no block is deleted."""
        depth = len(decoder)
        return None if keep_count(depth, self.ratio) == depth else block_influence(decoder, calibration)

    def select(self, depth: int, scores: Tensor | None) -> Sequence[int]:
        """Return the blocks of highest influence, in their order."""
        return range(depth) if scores is None else kept_blocks(scores, depth - keep_count(depth, self.ratio))


def keep_count(depth: int, ratio: float) -> int:
    """Return how many of ``depth`` blocks stay when the share ``ratio`` is deleted: at least one."""
    return max(1, depth - int(depth * ratio + 1e-9))


def kept_blocks(scores: Tensor, deleted: int) -> tuple[int, ...]:
    """Return the indices that stay, ascending, when the ``deleted`` lowest scores go; ties delete the lower index.

    Args:
        scores: (blocks,).
        deleted: How many go.
    """
    gone = set(torch.sort(scores, stable=True).indices[:deleted].tolist())
    return tuple(i for i in range(len(scores)) if i not in gone)


@torch.no_grad()
def block_influence(decoder: Decoder, calibration: Iterable[Batch]) -> Tensor:
    """Return BI_i = 1 - E[cos(X_i, X_{i+1})] over all non-padding tokens (Eq 4), float64 (blocks,).

    Streams through the body without the head: a hook on each block compares its input with its output, so that only
    two hidden states are alive at a time. The last block's output is thus taken before the final norm (Choice: the
    norm would make that block look far more influential than it is).

    Raises:
        DataError: If the calibration text holds no token.
        ModelError: If a hidden state is not finite.
    """
    scores = _Scores(len(decoder), decoder.model.device)
    handles = [
        block.register_forward_hook(scores.hook(index), with_kwargs=True) for index, block in enumerate(decoder.blocks)
    ]
    try:
        for batch in calibration:
            ids, mask = _unpack(batch, decoder.model.device)
            scores.mask = None if bool(mask.all()) else mask
            scores.tokens += int(mask.sum())
            decoder.body(input_ids=ids, attention_mask=mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if scores.tokens == 0:
        raise DataError("compression.calibration: the text holds no token; give rows with text")
    influence = 1.0 - scores.sums.cpu() / scores.tokens
    if not bool(influence.isfinite().all()):
        bad = int((~influence.isfinite()).nonzero()[0])
        raise ModelError(f"target: hidden states of block {bad} are not finite; load it in another target.dtype")
    return influence


class _Scores:
    """Running sums of cosines, one per block."""

    def __init__(self, depth: int, device: torch.device) -> None:
        self.sums = torch.zeros(depth, dtype=torch.float64, device=device)
        self.tokens = 0
        self.mask: Tensor | None = None

    def hook(self, index: int) -> Any:
        def compare(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before: Tensor = args[0] if args else kwargs["hidden_states"]
            cosines = F.cosine_similarity(before.float(), hidden_state(output).float(), dim=-1)
            if self.mask is not None:
                cosines = cosines * self.mask
            self.sums[index] += cosines.sum(dtype=torch.float64)

        return compare


def _unpack(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    if isinstance(batch, Mapping):
        ids = batch["input_ids"].to(device)
        mask = batch.get("attention_mask")
        return ids, torch.ones_like(ids) if mask is None else mask.to(device)
    return batch.to(device), torch.ones_like(batch, device=device)
