"""Small convex problems over the clients' weights: non-negative and summing to 1."""

from collections.abc import Callable

import torch
from torch import Tensor

_STEPS = 5000
_TOLERANCE = 1e-14


def project_on_simplex(point: Tensor) -> Tensor:
    """Return the nearest point whose entries are non-negative and sum to 1.

    Args:
        point: float64 (clients,).
    """
    ordered = point.sort(descending=True).values
    excess = ordered.cumsum(0) - 1.0
    ranks = torch.arange(1, len(point) + 1, dtype=point.dtype)
    support = int((ordered - excess / ranks > 0).sum())
    return (point - excess[support - 1] / support).clamp(min=0.0)


def minimise_on_simplex(
    value: Callable[[Tensor], Tensor], gradient: Callable[[Tensor], Tensor], clients: int
) -> Tensor:
    """Minimise a smooth convex function over the simplex by accelerated projected gradient with restarts.

    Args:
        value: Maps float64 (clients,) to a 0-dim tensor.
        gradient: Maps float64 (clients,) to its gradient.
        clients: Number of weights.

    Returns:
        float64 (clients,).
    """
    weights = torch.full((clients,), 1.0 / clients, dtype=torch.float64)
    ahead, momentum, step = weights, 1.0, 1.0
    best = value(weights)
    for _ in range(_STEPS):
        here, slope = value(ahead), gradient(ahead)
        while True:
            new = project_on_simplex(ahead - step * slope)
            move = new - ahead
            reached = value(new)
            if reached <= here + slope @ move + move @ move / (2.0 * step) + 1e-16 * here.abs() or step < 1e-12:
                break
            step *= 0.5
        if reached > best:  # the momentum overshot: start it afresh from the best point
            if torch.equal(ahead, weights):
                break
            ahead, momentum = weights, 1.0
            continue
        if float((new - weights).abs().max()) < _TOLERANCE:
            return new
        faster = (1.0 + (1.0 + 4.0 * momentum * momentum) ** 0.5) / 2.0
        ahead = new + (momentum - 1.0) / faster * (new - weights)
        weights, momentum, best, step = new, faster, reached, step * 1.5
    return weights
