"""Conflict-averse combinations of updates, found in the span of the updates from their Gram matrix alone.

Every function maps a float64 (clients, clients) Gram matrix to float64 (clients,) coefficients c; the merged update is
sum_k c_k Delta_k.
"""

import torch
from torch import Tensor

from fedproxy.strategies.functional.similarity import cosine_matrix
from fedproxy.strategies.functional.simplex import minimise_on_simplex


def pcgrad(gram: Tensor, orders: Tensor) -> Tensor:
    """Project each update off the updates it opposes, then average (Yu et al. 2020, arXiv 2001.06782, Alg. 1).

    If D_i . Delta_j < 0: D_i -= (D_i . Delta_j / ||Delta_j||^2) Delta_j, with Delta_j as sent.

    Args:
        gram: float64 (clients, clients).
        orders: int64 (clients, clients); row i is the order in which client i meets the others (itself is skipped).
    """
    clients = len(gram)
    rows = torch.eye(clients, dtype=torch.float64)
    for i in range(clients):
        for j in orders[i].tolist():
            inner = rows[i] @ gram[:, j]
            if j != i and inner < 0 < gram[j, j]:
                rows[i, j] -= inner / gram[j, j]
    return rows.mean(dim=0)


def config(gram: Tensor, *, length: str = "sum") -> Tensor:
    """Find the direction of equal positive cosine with every update (ConFIG, Liu et al. 2024, arXiv 2408.11104, Eq 2).

    v = U(M^+ 1) with the unit updates as rows of M; d = (sum_i Delta_i . v) v.

    Args:
        gram: float64 (clients, clients); zero updates are left out.
        length: ``sum`` of the projections as in the paper, or their ``mean``, the length of an averaging step.
    """
    norms = gram.diagonal().clamp(min=0.0).sqrt()
    moved = norms > 0
    coefficients = torch.zeros_like(norms)
    if not bool(moved.any()):
        return coefficients
    cosine = cosine_matrix(gram)[moved][:, moved]
    ones = torch.ones(len(cosine), dtype=torch.float64)
    # M^+ 1 = M^T (M M^T)^+ 1, and M M^T is the cosine matrix.
    in_units = torch.linalg.pinv(cosine, hermitian=True) @ ones
    size = (in_units @ cosine @ in_units).clamp(min=0.0).sqrt()
    if size <= 1e-12 * in_units.abs().max().clamp(min=1.0):
        return coefficients
    direction = in_units / size
    projections = norms[moved] * (cosine @ direction)
    total = projections.sum() if length == "sum" else projections.sum() / len(gram)
    coefficients[moved] = total * direction / norms[moved]
    return coefficients


def mgda(gram: Tensor) -> Tensor:
    """Find the convex combination of least norm (Sener and Koltun 2018, arXiv 1810.04650, Eq 3)."""
    scale = gram.diagonal().mean()
    if scale <= 0:
        return torch.full((len(gram),), 1.0 / len(gram), dtype=torch.float64)
    scaled = gram / scale
    return minimise_on_simplex(lambda w: w @ scaled @ w / 2, lambda w: scaled @ w, len(gram))


def cagrad(gram: Tensor, *, c: float) -> Tensor:
    """Stay near the mean while helping the worst-off client (CAGrad, Liu et al. 2021, arXiv 2110.14048, Alg. 1).

    d = g0 + sqrt(phi) / ||g_w|| g_w with g0 the mean, phi = c^2 ||g0||^2 and w the minimiser over the simplex of
    g_w . g0 + sqrt(phi) ||g_w||.

    Args:
        gram: float64 (clients, clients).
        c: Radius around the mean, in units of its norm; 0 is the mean.
    """
    clients = len(gram)
    mean = torch.full((clients,), 1.0 / clients, dtype=torch.float64)
    scale = gram.diagonal().mean()
    if scale <= 0 or c == 0:
        return mean
    scaled = gram / scale
    toward = scaled @ mean
    radius = c * (mean @ toward).clamp(min=0.0).sqrt()
    guard = 1e-30

    def value(w: Tensor) -> Tensor:
        return w @ toward + radius * (w @ scaled @ w + guard).clamp(min=guard).sqrt()

    def gradient(w: Tensor) -> Tensor:
        pulled = scaled @ w
        return toward + radius * pulled / (w @ pulled + guard).clamp(min=guard).sqrt()

    weights = minimise_on_simplex(value, gradient, clients)
    norm = (weights @ scaled @ weights).clamp(min=0.0).sqrt()
    return mean if norm <= 1e-12 else mean + radius / norm * weights
