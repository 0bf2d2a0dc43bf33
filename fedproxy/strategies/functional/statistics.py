"""Fisher merging and RegMean as their papers state them; the aggregators call these functions."""

from collections.abc import Sequence

import torch
from torch import Tensor


def fisher(deltas: Tensor, information: Tensor, shares: Tensor) -> Tensor:
    """Return sum_k p_k F_k Delta_k / sum_k p_k F_k (Matena and Raffel 2022, arXiv 2111.09832).

    Choice: where no client has information, the mean weighted by p_k alone is taken.

    Args:
        deltas: (clients, n).
        information: F_k, the diagonal Fisher information, (clients, n), non-negative.
        shares: p_k, (clients,), sum 1.

    Returns:
        (n,).
    """
    information = shares[:, None] * information
    known = information.sum(dim=0)
    merged = (information * deltas).sum(dim=0) / torch.where(known > 0, known, 1.0)
    return torch.where(known > 0, merged, (shares[:, None] * deltas).sum(dim=0))


def regmean(deltas: Tensor, grams: Sequence[Tensor], shares: Tensor, *, shrink: float = 0.9) -> Tensor:
    """Return W = (sum_k W_k G_k)(sum_k G_k)^-1 of one linear layer (RegMean, Jin et al. 2023, arXiv 2212.09849, Eq 2).

    Choice: directions in which no client had inputs, where the sum has no inverse, get the mean weighted by p_k. So
    W = M + (sum_k (W_k - M) G_k)(sum_k G_k)^+ with M that mean, which is Eq 2 where the inverse exists.

    Args:
        deltas: W_k, (clients, out, in): weights, or their changes from one start, for which the equation holds too.
        grams: G_k = X_k^T X_k, float64 (in, in), of the layer's inputs X_k.
        shares: p_k, (clients,), sum 1.
        shrink: Factor of the off-diagonal entries of G_k (the paper's alpha).

    Returns:
        (out, in), in the dtype of ``deltas``.
    """
    shrunk = [gram * shrink + torch.diag(gram.diagonal() * (1.0 - shrink)) for gram in grams]
    mean: Tensor = torch.tensordot(shares, deltas, dims=1)
    apart = sum(((w - mean).double() @ gram for w, gram in zip(deltas, shrunk, strict=True)), torch.zeros(()))
    change: Tensor = apart @ torch.linalg.pinv(torch.stack(shrunk).sum(dim=0), hermitian=True)
    return mean + change.to(mean.dtype)
