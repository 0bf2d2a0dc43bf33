"""What the Gram matrix of the updates says: cosines, heterogeneity, weights and retention (FedProxy Eqs 5, 6, 10).

Everything here is float64 and of size K or K x K; the pass over the coordinates that fills the Gram matrix is
elsewhere.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_SPAN = 1e-12  # below this spread of heterogeneity all clients keep the same share (Eq 10)


def cosine_matrix(gram: Tensor) -> Tensor:
    """Return the cosines S_ij of Eq (5), symmetric to the bit.

    Choice: only the upper triangle is read, so that S_ij and S_ji come from one number; a zero update has cosine 0 with
    every client, itself included.

    Args:
        gram: float64 (clients, clients), inner products of the updates.

    Returns:
        float64 (clients, clients), in [-1, 1].
    """
    upper = gram.double().triu(1)
    square = gram.diagonal().double()
    scale = torch.outer(square, square).sqrt()
    cosine = torch.where(scale > 0, (upper + upper.T) / scale.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    cosine = cosine.clamp(-1.0, 1.0)
    return cosine + torch.diag((square > 0).double())


def with_equal_rows(gram: Tensor, groups: Iterable[Sequence[int]]) -> Tensor:
    """Return a Gram matrix in which equal vectors have equal inner products with every other, to the bit.

    A matrix product may sum a row in another order where it stands elsewhere, so that two equal clients would differ in
    the last bit; which order, depends on the processor. Choice: of equal vectors the first one's products count.

    Args:
        gram: float64 (clients, clients), of which the upper triangle is read.
        groups: Clients whose vectors are equal, group by group.

    Returns:
        float64 (clients, clients), symmetric.
    """
    upper = gram.triu(1)
    whole = upper + upper.T + torch.diag(gram.diagonal())
    for first, *others in groups:
        for other in others:
            whole[other] = whole[first]
            whole[:, other] = whole[:, first]
    return whole


def heterogeneity(cosine: Tensor) -> Tensor:
    """Return h_k = 1 - mean over j != k of max(0, S_kj) (Eq 5), in [0, 1]; 0 for a single client.

    Choice: sums are rounded once (``math.fsum``), so that equal clients get equal h whatever their place in the order.

    Args:
        cosine: float64 (clients, clients).

    Returns:
        float64 (clients,).
    """
    clients = len(cosine)
    if clients == 1:
        return torch.zeros(1, dtype=torch.float64)
    return 1.0 - _sum_of_others(cosine.clamp(min=0.0)) / (clients - 1)


def affinity_weights(cosine: Tensor, *, similarity: str = "absolute") -> Tensor:
    """Return w_k = softmax_k(sum over j != k of |S_kj|) (Eq 6), which sums to 1.

    Args:
        cosine: float64 (clients, clients).
        similarity: ``absolute`` is the paper's |S|, which gives an opposing client as much weight as an agreeing one;
            ``positive`` counts max(0, S).

    Returns:
        float64 (clients,).
    """
    strength = cosine.abs() if similarity == "absolute" else cosine.clamp(min=0.0)
    return torch.softmax(_sum_of_others(strength), dim=0)


def retention(spread: Tensor, *, r0: float, delta: float) -> Tensor:
    """Return the kept share r_k = r0 - delta (h_k - min h) / (max h - min h) (Eq 10), clipped to [0, 1].

    The fraction is 0 where the span of h is at most 1e-12.

    Args:
        spread: float64 (clients,), the heterogeneity h.
        r0: Share that the least heterogeneous client keeps.
        delta: How much less the most heterogeneous client keeps.

    Returns:
        float64 (clients,).
    """
    low, span = spread.min(), float(spread.max() - spread.min())
    fraction = (spread - low) / span if span > _SPAN else torch.zeros_like(spread)
    return (r0 - delta * fraction).clamp(0.0, 1.0)


def stock_ratio(gram: Tensor) -> float:
    """Return Model Stock's t = K cos / (1 + (K - 1) cos), cos the mean cosine of two updates (Jang et al. 2024).

    arXiv 2403.19522. Choice: t is 0 where the denominator vanishes, and 1 for a single client.

    Args:
        gram: float64 (clients, clients), inner products of the updates of one tensor.
    """
    clients = len(gram)
    if clients == 1:
        return 1.0
    upper = torch.ones(clients, clients).triu(1).bool()
    cosine = float(cosine_matrix(gram)[upper].mean())
    below = 1.0 + (clients - 1) * cosine
    return clients * cosine / below if abs(below) > 1e-6 else 0.0


def _sum_of_others(matrix: Tensor) -> Tensor:
    rows = matrix.tolist()
    sums = [math.fsum(value for j, value in enumerate(row) if j != k) for k, row in enumerate(rows)]
    return torch.tensor(sums, dtype=torch.float64)
