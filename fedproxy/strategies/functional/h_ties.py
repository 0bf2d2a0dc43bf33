"""H-TIES as the paper states it, on whole updates. The aggregator gives the same, block by block."""

import torch
from torch import Tensor

from fedproxy.strategies.functional.trimming import top_share


def h_ties(
    deltas: Tensor, *, r0: float = 1.0, delta: float = 0.2, rho: float = 1.1, eps: float = 1e-12
) -> tuple[Tensor, Tensor]:
    """Merge updates by H-TIES (FedProxy, ACL 2026, arXiv 2604.19015, Eqs 5-7 and 10-14).

    Args:
        deltas: (clients, n) with at least two clients, floating point, none of them zero; float64 is exact enough to
            check others by.
        r0: Share of coordinates that the least heterogeneous client keeps.
        delta: How much less the most heterogeneous client keeps.
        rho: Least ratio of winning to losing mass.
        eps: Guard of that ratio.

    Returns:
        The merged update m (n,) and the conflict C (n,), in [0, 1].
    """
    clients, units = len(deltas), deltas / deltas.norm(dim=1, keepdim=True)
    others = (units @ units.T).fill_diagonal_(0.0)  # Eq 5: S_kj, for j != k
    spread = 1.0 - others.clamp(min=0.0).sum(dim=1) / (clients - 1)  # Eq 5: h_k
    weights = others.abs().sum(dim=1).softmax(dim=0)  # Eq 6: w_k
    conflict = 1.0 - deltas.sign().sum(dim=0).abs() / clients  # Eq 7: C_p

    span = spread.max() - spread.min()
    kept = r0 - delta * ((spread - spread.min()) / span if span > 1e-12 else torch.zeros_like(spread))  # Eq 10: r_k
    trimmed = torch.stack([top_share(row, share) for row, share in zip(deltas, kept.tolist(), strict=True)])
    scaled = weights[:, None] * trimmed  # Eq 11: d_k = w_k Top_{r_k}(Delta_k)
    positive, negative = scaled.clamp(min=0.0).sum(dim=0), scaled.clamp(max=0.0).abs().sum(dim=0)  # Eq 12
    plus, minus = positive / (negative + eps) >= rho, negative / (positive + eps) >= rho
    elected = plus.to(deltas.dtype) - minus.to(deltas.dtype)  # Eq 13: gamma_p
    agrees = (scaled.sign() == elected) & (elected != 0)  # A_p
    share = (weights[:, None] * agrees).sum(dim=0)
    return (scaled * agrees).sum(dim=0) / share.where(share > 0, torch.ones_like(share)), conflict  # Eq 14: m_p
