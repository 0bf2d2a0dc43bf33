"""TIES-Merging as its paper states it, on whole updates. The aggregator gives the same, block by block."""

import torch
from torch import Tensor

from fedproxy.strategies.functional.trimming import top_share


def ties(deltas: Tensor, *, density: float = 0.2, scale: float = 1.0) -> Tensor:
    """Trim, elect signs, average what agrees (Yadav et al. 2023, arXiv 2306.01708, Sec. 3; authors' code).

    Deviation: exactly floor(density n) coordinates are kept; the authors' code keeps one more.

    Args:
        deltas: (clients, n), floating point.
        density: Share of coordinates that trimming keeps.
        scale: Factor of the merged update (the paper's lambda).

    Returns:
        The merged update (n,).
    """
    trimmed = torch.stack([top_share(row, density) for row in deltas])
    elected = trimmed.sum(dim=0).sign()
    elected = elected.where(elected != 0, elected.sum().sign())  # a zero sum takes the sign that most coordinates elect
    agrees = (trimmed.sign() == elected) & (trimmed != 0)
    return scale * (trimmed * agrees).sum(dim=0) / agrees.sum(dim=0).clamp(min=1)
