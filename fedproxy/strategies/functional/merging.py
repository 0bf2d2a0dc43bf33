"""Merges of models that look across the clients, tensor by tensor: SCE, Model Stock and Consensus."""

import torch
from torch import Tensor

from fedproxy.strategies.functional.similarity import cosine_matrix
from fedproxy.strategies.functional.trimming import Trimmer, find_threshold, top_count
from fedproxy.strategies.functional.voting import elect_sign


def sce(deltas: Tensor, *, density: float) -> Tensor:
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
        count = top_count(density, int(variance.count_nonzero()))
        trimmer = Trimmer([find_threshold(lambda: [variance], variance.numel(), count)])
        selected = trimmer.trim([variance], torch.empty(1, variance.numel()))
        deltas = torch.where(selected > 0, deltas, 0.0)
    energy = deltas.double().square().sum(dim=1)
    total = energy.sum()
    shares = (energy / total if total > 0 else torch.full_like(energy, 1.0 / len(deltas))).float()
    agree = (deltas.sign() == elect_sign(deltas)) & (deltas != 0)
    kept = shares.unsqueeze(1) * agree
    divisor = kept.sum(dim=0)
    return (kept * deltas).sum(dim=0) / torch.where(divisor > 0, divisor, 1.0)


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


def consensus(deltas: Tensor, *, scale: float, threshold: float, min_clients: int) -> Tensor:
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
