"""The run of blocks with the smallest angular distance across it (Gromov et al. 2024, arXiv 2403.17887)."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fedproxy.errors import ModelError
from fedproxy.models import Decoder
from fedproxy.strategies.compression.base import Batch
from fedproxy.strategies.compression.removal import BlockRemoval
from fedproxy.strategies.compression.states import watch_blocks


@dataclass(frozen=True)
class Angular(BlockRemoval, name="angular"):
    """Removes the n neighbouring blocks l ... l + n - 1 with the smallest angular distance d(X_l, X_{l+n}).

    d(x, y) = arccos(<x, y> / (||x|| ||y||)) / pi, taken at each text's last token and averaged over the texts. Choice:
    of equal distances the lower l; the last block's output is taken before the final norm; texts cut by
    ``calibration.max_tokens`` end where they are cut.
    """

    def measure(self, decoder: Decoder, calibration: Iterable[Batch]) -> Tensor | None:
        """Return d(X_l, X_{l+n}) for every start l of a run, float64 (starts,)."""
        states = last_token_states(decoder, calibration)
        return run_distances(states, len(decoder) - self.kept_count(decoder))

    def choose(self, depth: int, count: int, scores: Tensor | None) -> Sequence[int]:
        """Return all blocks but the run of the smallest distance."""
        assert scores is not None
        start = int(scores.argmin())
        return (*range(start), *range(start + depth - count, depth))


def last_token_states(decoder: Decoder, calibration: Iterable[Batch]) -> Tensor:
    """Return the hidden state at each text's last real token before every block and after the last one.

    Returns:
        Float32 on the CPU, (blocks + 1, texts, hidden).

    Raises:
        DataError: If the calibration text holds no token.
        ModelError: If a hidden state is not finite.
    """
    kept: list[list[Tensor]] = [[] for _ in range(len(decoder) + 1)]

    def keep(index: int, before: Tensor, after: Tensor, mask: Tensor) -> None:
        texts = mask.any(dim=1).nonzero()[:, 0]
        places = torch.arange(mask.shape[1], device=mask.device)
        last = (mask.bool() * (places + 1)).max(dim=1).values[texts] - 1
        kept[index].append(before[texts, last].float().cpu())
        if index == len(decoder) - 1:
            kept[-1].append(after[texts, last].float().cpu())

    watch_blocks(decoder, calibration, keep)
    states = torch.stack([torch.cat(parts) for parts in kept])
    if not bool(states.isfinite().all()):
        raise ModelError("target: hidden states are not finite; load it in another target.dtype")
    return states


def run_distances(states: Tensor, length: int) -> Tensor:
    """Return the mean angular distance, in [0, 1], between the state before block l and that ``length`` blocks later.

    Args:
        states: (blocks + 1, texts, hidden).
        length: Blocks in a run, >= 1.

    Returns:
        Float64 (blocks + 1 - length,).
    """
    cosines = F.cosine_similarity(states[:-length].double(), states[length:].double(), dim=-1)
    return cosines.clamp(-1.0, 1.0).arccos().mean(dim=1) / math.pi
