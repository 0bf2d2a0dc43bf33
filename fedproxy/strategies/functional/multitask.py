"""PCGrad, ConFIG, MGDA and CAGrad as their papers state them, on whole updates: (clients, n), best in float64.

The aggregators find the same from the updates' inner products (:mod:`~fedproxy.strategies.functional.gradients`). MGDA
and CAGrad solve a problem: here stands what they minimise or maximise.
"""

import torch
from torch import Tensor


def pcgrad(deltas: Tensor, orders: Tensor) -> Tensor:
    """Project each update off the updates it opposes, then average (PCGrad, Yu et al. 2020, arXiv 2001.06782, Alg. 1).

    Choice: the mean of the projected updates, where the paper has their sum.

    Args:
        deltas: (clients, n).
        orders: int64 (clients, clients); row i is the order in which client i meets the others (itself is skipped).
    """
    projected = deltas.clone()
    for i, order in enumerate(orders.tolist()):
        for j in order:
            inner = projected[i] @ deltas[j]
            if j != i and inner < 0:
                projected[i] -= inner / deltas[j].square().sum() * deltas[j]
    return projected.mean(dim=0)


def config(deltas: Tensor, *, length: str = "sum") -> Tensor:
    """Return the step of equal positive cosine with every update (ConFIG, Liu et al. 2024, arXiv 2408.11104, Eq 2).

    Args:
        deltas: (clients, n), none of them zero.
        length: ``sum`` of the updates' projections as in the paper, or their ``mean``.
    """
    units = deltas / deltas.norm(dim=1, keepdim=True)
    solution = torch.linalg.pinv(units) @ units.new_ones(len(units))  # M^+ 1
    direction = solution / solution.norm()  # v = U(M^+ 1)
    projections = deltas @ direction
    step: Tensor = (projections.sum() if length == "sum" else projections.mean()) * direction
    return step


def mgda_cost(weights: Tensor, deltas: Tensor) -> Tensor:
    """Return ||sum_k w_k Delta_k||^2: MGDA's step is the sum of least cost (Sener and Koltun 2018, Eq 3).

    arXiv 1810.04650. The weights (clients,) are non-negative and sum to 1.
    """
    return (weights @ deltas).square().sum()


def cagrad_gain(step: Tensor, deltas: Tensor, *, c: float = 0.5) -> Tensor:
    """Return min_k Delta_k . d at d = ``step``: CAGrad takes the step of most gain (Liu et al. 2021, arXiv 2110.14048).

    The step lies in the ball ||d - g0|| <= c ||g0|| around the mean update g0; Alg. 1 finds it by the dual problem.

    Args:
        step: d, (n,).
        deltas: (clients, n).
        c: Radius of the ball, in units of ||g0||.

    Returns:
        The worst-off client's gain, minus infinity outside the ball.
    """
    mean = deltas.mean(dim=0)
    inside = (step - mean).norm() <= c * mean.norm() * (1.0 + 1e-6)
    return (deltas @ step).min().where(inside, -torch.inf)
