"""Means, plain and robust, as their papers state them, on whole updates: float64 (clients, n) to (n,).

The aggregators of the same names give the same values from inner products, sorting networks and blocks.
"""

import torch
from torch import Tensor


def fedavg(deltas: Tensor, shares: Tensor) -> Tensor:
    """Return sum_k (n_k / n) Delta_k, ``shares`` (clients,) being n_k / n (McMahan et al. 2017, arXiv 1602.05629)."""
    return shares @ deltas


def task_arithmetic(deltas: Tensor, *, scale: float = 0.4) -> Tensor:
    """Return scale * sum_k Delta_k (Ilharco et al. 2023, arXiv 2212.04089)."""
    return scale * deltas.sum(dim=0)


def median(deltas: Tensor) -> Tensor:
    """Return each coordinate's middle value, of even counts the mean of two (Yin et al. 2018, arXiv 1803.01498)."""
    return deltas.quantile(0.5, dim=0)


def trimmed_mean(deltas: Tensor, *, beta: float = 0.1) -> Tensor:
    """Return each coordinate's mean without the floor(beta K) values at either end (Yin et al. 2018)."""
    clients, cut = len(deltas), int(beta * len(deltas) + 1e-9)
    return deltas.sort(dim=0).values[cut : clients - cut].mean(dim=0)


def norm_bound(deltas: Tensor, *, bound: float = 1.0) -> Tensor:
    """Return mean_k Delta_k min(1, bound / ||Delta_k||) (Sun et al. 2019, arXiv 1911.07963)."""
    factors: Tensor = (bound / deltas.norm(dim=1, keepdim=True)).clamp(max=1.0)
    return (deltas * factors).mean(dim=0)


def centered_clipping(deltas: Tensor, centre: Tensor, *, radius: float = 1.0, iterations: int = 1) -> Tensor:
    """Return v after v <- v + mean_k (Delta_k - v) min(1, tau / ||Delta_k - v||) (Karimireddy et al. 2021).

    Args:
        deltas: (clients, n).
        centre: The last round's v (n,), 0 in the first.
        radius: tau.
        iterations: Steps of a round.
    """
    for _ in range(iterations):
        centre = centre + norm_bound(deltas - centre, bound=radius)
    return centre


def geometric_median_cost(point: Tensor, deltas: Tensor, shares: Tensor) -> Tensor:
    """Return sum_k w_k ||Delta_k - v|| at v = ``point``: RFA minimises it (Pillutla et al. 2022, arXiv 1912.13445)."""
    distances: Tensor = (deltas - point).norm(dim=1)
    return shares @ distances


def krum_ranking(deltas: Tensor, *, byzantine: int = 1) -> Tensor:
    """Return the clients, int64 (clients,), by Krum's score, best first (Blanchard et al. 2017, arXiv 1703.02757).

    A client's score is the sum of squared distances to its K - f - 2 nearest others, one at least.
    """
    distances = torch.cdist(deltas, deltas, compute_mode="donot_use_mm_for_euclid_dist").square()
    nearest = max(1, len(deltas) - byzantine - 2)
    return distances.sort(dim=1).values[:, 1 : nearest + 1].sum(dim=1).argsort(stable=True)


def multi_krum(deltas: Tensor, *, byzantine: int = 1, keep: int | None = None) -> Tensor:
    """Return the mean of the ``keep`` updates of least Krum score, K - f by default; Krum itself keeps one."""
    best = krum_ranking(deltas, byzantine=byzantine)[: keep or len(deltas) - byzantine]
    return deltas[best].mean(dim=0)


def bulyan(deltas: Tensor, *, byzantine: int = 1) -> Tensor:
    """Pick K - 2 f updates by repeated Krum; average each coordinate's K - 4 f nearest to their median.

    El Mhamdi et al. 2018, arXiv 1802.07927. Choice: of equally near values the smaller one.
    """
    left, picked = deltas, []
    for _ in range(len(deltas) - 2 * byzantine):
        best = int(krum_ranking(left, byzantine=byzantine)[0])
        picked.append(left[best])
        left = torch.cat((left[:best], left[best + 1 :]))
    chosen = torch.stack(picked).sort(dim=0).values
    order = (chosen - median(chosen)).abs().argsort(dim=0, stable=True)
    return chosen.gather(0, order[: len(deltas) - 4 * byzantine]).mean(dim=0)
