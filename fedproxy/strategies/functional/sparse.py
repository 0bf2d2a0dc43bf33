"""DARE, DELLA and Model Breadcrumbs as their papers state them: each thins updates out and leaves the merge open.

What is dropped becomes zero. ``means.fedavg`` or ``ties.elected_mean`` merges what is left.
"""

import torch
from torch import Tensor

from fedproxy.strategies.functional.trimming import top_count


def dare(deltas: Tensor, draws: Tensor, *, drop_rate: float = 0.9) -> Tensor:
    """Drop each coordinate with probability p, divide the others by 1 - p (DARE, Yu et al. 2024, arXiv 2311.03099).

    Args:
        deltas: Any shape.
        draws: The same shape, uniform in [0, 1): a coordinate is dropped where its draw is below p.
        drop_rate: p.
    """
    return torch.where(draws >= drop_rate, deltas / (1.0 - drop_rate), 0.0)


def della(deltas: Tensor, draws: Tensor, *, density: float = 0.3, window: float = 0.2) -> Tensor:
    """Keep each coordinate with a probability of its own, and divide by it (DELLA, Deep et al. 2024, arXiv 2406.11617).

    Args:
        deltas: (clients, *shape), one tensor.
        draws: The same shape, uniform in [0, 1): a coordinate stays where its draw is below its probability.
        density: Mean probability.
        window: Probability of the largest minus that of the smallest magnitude of a row.
    """
    keep = keep_probabilities(deltas, density=density, window=window)
    return torch.where(draws < keep, deltas / keep, 0.0)


def keep_probabilities(deltas: Tensor, *, density: float, window: float) -> Tensor:
    """Return DELLA's keep probabilities, (clients, *shape): linear in the rank of the magnitude within its row.

    Args:
        deltas: (clients, *shape); a row is the last dimension, a tensor of one dimension is one row.
        density: Mean probability.
        window: Probability of the largest minus that of the smallest magnitude.
            Choice: a row of one entry has the mean.
    """
    rows = deltas if deltas.dim() > 1 else deltas.unsqueeze(1)
    ranks = rows.abs().argsort(dim=-1, stable=True).argsort(dim=-1).to(deltas.dtype)
    last = rows.shape[-1] - 1
    share = ranks / last if last > 0 else torch.full_like(ranks, 0.5)
    return (density + window * (share - 0.5)).view(deltas.shape)


def breadcrumbs(deltas: Tensor, *, density: float = 0.85, gamma: float = 0.01) -> Tensor:
    """Drop the floor(gamma n) largest magnitudes, keep the next floor(density n) (Davari and Belilovsky 2024).

    arXiv 2312.06795. Of equal magnitudes the earlier coordinate counts as the larger one.

    Args:
        deltas: (clients, n), one tensor.
        density: Share of coordinates that is kept.
        gamma: Share of the largest magnitudes that is dropped.
    """
    first, count = (top_count(share, deltas.shape[1]) for share in (gamma, density))
    order = deltas.abs().argsort(dim=1, descending=True, stable=True)
    kept = torch.zeros_like(deltas, dtype=torch.bool).scatter_(1, order[:, first : first + count], value=True)
    return deltas.where(kept, torch.zeros_like(deltas))
