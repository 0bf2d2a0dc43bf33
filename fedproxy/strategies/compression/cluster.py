"""Clusters of similar neighbouring blocks, one kept of each (CRaSh, Zhang et al. 2023, arXiv 2310.15477)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fedproxy.errors import ConfigError, DataError, ModelError
from fedproxy.models import Decoder
from fedproxy.strategies.compression.base import Batch
from fedproxy.strategies.compression.removal import BlockRemoval
from fedproxy.strategies.compression.states import watch_blocks


@dataclass(frozen=True)
class Cluster(BlockRemoval, name="cluster"):
    """Clusters adjacent blocks by the CKA of their outputs and keeps one per cluster, its centre.

    Neighbouring clusters with the highest mean CKA between their blocks are merged until as many are left as blocks are
    to stay. The centre is the block with the highest mean CKA to its cluster. With ``share`` the depth stays: copies of
    the centre's weights stand in the places of the removed blocks, ``trainable.blocks: centres`` trains the centres
    alone, and fusion plugs back the centres.

    Choice: the paper's linkage and centre are not known to us beyond clustering neighbours by CKA; ties go to the lower
    index; an example of the CKA is one text, its hidden state averaged over real tokens.
    """

    share: bool = False
    """Repeat a cluster's centre at the places of its removed blocks, so that depth is kept."""

    def __post_init__(self) -> None:
        """Check the options, and that there are texts enough to tell blocks apart."""
        super().__post_init__()
        if self.calibration.rows < 2 and self.keep is None and self.ratio:
            raise ConfigError(
                f"compression.calibration.rows must be at least 2 with compression.name=cluster, got "
                f"{self.calibration.rows}: one text tells no block from another"
            )

    def arranged(self, kept: tuple[int, ...], depth: int) -> tuple[int, ...]:
        """Return the blocks that stay, with ``share`` in all places."""
        return shared_by_nearest(kept, depth) if self.share else kept

    def measure(self, decoder: Decoder, calibration: Iterable[Batch]) -> Tensor | None:
        """Return the linear CKA between the outputs of all pairs of blocks, float64 (blocks, blocks).

        Raises:
            DataError: If there are fewer than two texts: CKA centres over them, and one has none to differ from.
        """
        states = mean_states(decoder, calibration)
        if states.shape[1] < 2:
            raise DataError(
                "compression.calibration: cluster compares blocks over at least 2 public texts, and "
                f"{states.shape[1]} is left; add texts or choose another compressor"
            )
        return linear_cka(states)

    @property
    def leaves_gaps(self) -> bool:
        """Return whether the places of removed blocks stay empty."""
        return not self.share

    def select(self, decoder: Decoder, scores: Tensor | None) -> Sequence[int]:
        """Return the centres, ascending; with ``share`` each as often as its cluster has blocks."""
        chosen = super().select(decoder, scores)
        if not self.share or len(chosen) == len(decoder):
            return chosen
        if self.keep is not None:
            return shared_by_nearest(chosen, len(decoder))
        assert scores is not None
        clusters = neighbour_clusters(scores, len(chosen))
        return tuple(centre for centre, members in zip(chosen, clusters, strict=True) for _ in members)

    def choose(self, depth: int, count: int, scores: Tensor | None) -> Sequence[int]:
        """Return each cluster's centre."""
        assert scores is not None
        return tuple(centre_of(scores, members) for members in neighbour_clusters(scores, count))


def mean_states(decoder: Decoder, calibration: Iterable[Batch]) -> Tensor:
    """Return every block's output averaged over the real tokens of each text, float64 (blocks, texts, hidden).

    Raises:
        DataError: If the calibration text holds no token.
        ModelError: If a hidden state is not finite.
    """
    kept: list[list[Tensor]] = [[] for _ in range(len(decoder))]

    def keep(index: int, before: Tensor, after: Tensor, mask: Tensor) -> None:
        texts = mask.any(dim=1)
        weights = (mask / mask.sum(dim=1, keepdim=True).clamp_min(1)).to(torch.float32)
        kept[index].append(torch.einsum("bt,bth->bh", weights, after.float())[texts].double().cpu())

    watch_blocks(decoder, calibration, keep)
    states = torch.stack([torch.cat(parts) for parts in kept])
    if not bool(states.isfinite().all()):
        raise ModelError("target: hidden states are not finite; load it in another target.dtype")
    return states


def linear_cka(states: Tensor) -> Tensor:
    """Return CKA(X, Y) = ||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F), columns centred, between all pairs of blocks.

    Linear centred kernel alignment (Kornblith et al. 2019, arXiv 1905.00414), computed from texts x texts Gram
    matrices; a block whose output is the same for every text has CKA 0 with every other.

    Args:
        states: Float64 (blocks, texts, hidden).

    Returns:
        Float64 (blocks, blocks), in [0, 1], symmetric.
    """
    centred = states - states.mean(dim=1, keepdim=True)
    gram = (centred @ centred.transpose(1, 2)).flatten(1)
    gram = gram / gram.norm(dim=1, keepdim=True).clamp_min(torch.finfo(gram.dtype).tiny)
    similarity: Tensor = (gram @ gram.T).clamp(0.0, 1.0)
    return similarity


def neighbour_clusters(similarity: Tensor, count: int) -> list[list[int]]:
    """Return ``count`` runs of neighbouring blocks, merged bottom up by the highest mean similarity between members.

    Args:
        similarity: (blocks, blocks), symmetric.
        count: How many clusters are left, >= 1.
    """
    clusters = [[index] for index in range(len(similarity))]
    while len(clusters) > count:
        links = [float(similarity[left][:, right].mean()) for left, right in pairwise(clusters)]
        best = links.index(max(links))
        clusters[best : best + 2] = [clusters[best] + clusters[best + 1]]
    return clusters


def centre_of(similarity: Tensor, members: Sequence[int]) -> int:
    """Return the member with the highest mean similarity to all members, the lowest index of equals."""
    within = similarity[members][:, members].mean(dim=1)
    return members[int(within.argmax())]


def shared_by_nearest(kept: Sequence[int], depth: int) -> tuple[int, ...]:
    """Return, for each of ``depth`` places, the nearest kept block, the lower one of two."""
    return tuple(min(kept, key=lambda block: (abs(block - place), block)) for place in range(depth))
