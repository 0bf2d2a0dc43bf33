"""SCE, Model Stock and Consensus as their papers state them, on one tensor of all clients."""

import torch
from torch import Tensor

from fedproxy.strategies.functional.trimming import largest, top_count
from fedproxy.strategies.functional.voting import elect_sign


def sce(deltas: Tensor, *, density: float = 1.0) -> Tensor:
    """Select, calculate, erase (FuseChat, Wan et al. 2024, arXiv 2408.07990).

    Select the coordinates of largest variance over the clients; weigh each client by the energy of what was selected,
    w_k = ||Delta_k||^2 / sum_j ||Delta_j||^2; erase the values whose sign is not that of the sum; return the weighted
    mean of the rest. Choice: the share is counted over coordinates of non-zero variance, as mergekit does.

    Args:
        deltas: float32 (clients, n).
        density: Share of coordinates selected, in (0, 1].

    Returns:
        float32 (n,).
    """
    if density < 1.0:
        variance = deltas.var(dim=0, correction=0)
        selected = largest(variance[None], top_count(density, int(variance.count_nonzero())))
        deltas = torch.where(selected > 0, deltas, 0.0)
    energy = deltas.double().square().sum(dim=1)
    total = energy.sum()
    shares = (energy / total if total > 0 else torch.full_like(energy, 1.0 / len(deltas))).float()
    agree = (deltas.sign() == elect_sign(deltas)) & (deltas != 0)
    kept = shares.unsqueeze(1) * agree
    divisor = kept.sum(dim=0)
    return (kept * deltas).sum(dim=0) / torch.where(divisor > 0, divisor, 1.0)


def model_stock(deltas: Tensor) -> Tensor:
    """Return t times the mean, t = K cos / (1 + (K - 1) cos) (Model Stock, Jang et al. 2024, arXiv 2403.19522).

    cos is the mean cosine of two clients' updates. Choice: t is 0 where the denominator vanishes; a zero update has
    cosine 0 with the others.

    Args:
        deltas: (clients, n), at least two clients.

    Returns:
        (n,).
    """
    clients, units = len(deltas), torch.nn.functional.normalize(deltas, dim=1)
    cosine = (units @ units.T)[torch.ones(clients, clients).triu(1).bool()].mean()
    below = 1.0 + (clients - 1) * cosine
    return deltas.mean(dim=0) * (clients * cosine / below if below.abs() > 1e-6 else 0.0)


def consensus(deltas: Tensor, *, scale: float = 0.4, threshold: float = 0.4, min_clients: int = 2) -> Tensor:
    """Keep the sum of the coordinates that enough clients use (Wang et al. 2024, arXiv 2405.07813).

    With S = sum_k Delta_k, a coordinate matters to client k where |Delta_kp| >= threshold |S_p - Delta_kp|.

    Args:
        deltas: float32 (clients, *shape).
        scale: Factor of the sum.
        threshold: How large a client's own value must be against the others' sum (the paper's lambda).
        min_clients: Clients that a coordinate must matter to.

    Returns:
        float32 (*shape): scale S_p, or 0.
    """
    total = deltas.sum(dim=0)
    users = (deltas.abs() >= threshold * (total - deltas).abs()).sum(dim=0)
    return torch.where(users >= min_clients, scale * total, 0.0)
