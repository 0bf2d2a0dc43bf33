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
    return scale * elected_mean(torch.stack([top_share(row, density) for row in deltas]))


def elected_mean(
    trimmed: Tensor, shares: Tensor | None = None, *, vote: str = "uniform", divisor: str = "count"
) -> Tensor:
    """Elect a sign per coordinate and average the values that have it (TIES-Merging, Sec. 3, steps 2 and 3).

    Args:
        trimmed: (clients, n), zero where a client's value was dropped.
        shares: p_k, (clients,), sum 1; read by the options that weigh.
        vote: ``uniform`` elects the sign of the sum of values, ``weighted`` that of p_k times the values.
        divisor: ``count`` is the plain mean, ``weight`` the mean weighted by p_k, ``weighted_count`` the sum weighted
            by p_k over the number of values.

    Returns:
        (n,), zero where no value has the elected sign.
    """
    ones = trimmed.new_ones(len(trimmed), 1)
    weights = ones if shares is None else shares[:, None]
    elected = ((weights if vote == "weighted" else ones) * trimmed).sum(dim=0).sign()
    elected = elected.where(elected != 0, elected.sum().sign())  # a zero sum takes the sign that most coordinates elect
    agrees = (trimmed.sign() == elected) & (trimmed != 0)
    total = ((ones if divisor == "count" else weights) * trimmed * agrees).sum(dim=0)
    counted = ((weights if divisor == "weight" else ones) * agrees).sum(dim=0)
    return total / counted.where(counted > 0, torch.ones_like(counted))
