"""Robust statistics of updates: distances from the Gram matrix, and order statistics coordinate by coordinate."""

import torch
from torch import Tensor

_WEISZFELD_STEPS = 10_000


def squared_distances(gram: Tensor) -> Tensor:
    """Return ||Delta_i - Delta_j||^2 of whole updates, float64 (clients, clients), from their Gram matrix."""
    square = gram.diagonal()
    distances = (square.unsqueeze(0) + square.unsqueeze(1) - 2.0 * gram).clamp(min=0.0)
    return distances.fill_diagonal_(0.0)


def krum_scores(distances: Tensor, byzantine: int) -> Tensor:
    """Return each client's sum of squared distances to its K - f - 2 nearest others (Blanchard et al. 2017).

    Args:
        distances: float64 (clients, clients), squared.
        byzantine: f, clients that may be hostile; at least one neighbour is always counted.
    """
    clients = len(distances)
    nearest = max(1, clients - byzantine - 2)
    others = distances + torch.diag(torch.full((clients,), float("inf"), dtype=distances.dtype))
    return others.sort(dim=1).values[:, :nearest].sum(dim=1)


def bulyan_selection(distances: Tensor, byzantine: int) -> list[int]:
    """Return the K - 2 f clients that repeated Krum picks, each removed once picked (El Mhamdi et al. 2018)."""
    left = list(range(len(distances)))
    chosen = []
    for _ in range(len(distances) - 2 * byzantine):
        index = torch.tensor(left)
        part = distances[index][:, index]
        best = int(krum_scores(part, byzantine).argmin()) if len(left) > 1 else 0
        chosen.append(left.pop(best))
    return sorted(chosen)


def geometric_median(gram: Tensor, weights: Tensor, *, tolerance: float = 1e-12) -> Tensor:
    """Return the coefficients of the point with the least weighted sum of distances, by Weiszfeld's iteration.

    The iteration runs in the span of the updates. Where an update is itself the minimiser (Vardi and Zhang 2000), it is
    returned at once, because the iteration would only creep towards it.

    Args:
        gram: float64 (clients, clients).
        weights: float64 (clients,), positive, sum 1.
        tolerance: The iteration ends when no coefficient moves by more.
    """
    clients = len(gram)
    corner = _dominant_update(gram, weights)
    if corner is not None:
        return torch.nn.functional.one_hot(torch.tensor(corner), clients).double()
    guard = 1e-24 * gram.diagonal().max()
    point = weights
    for _ in range(_WEISZFELD_STEPS):
        squares = gram.diagonal() - 2.0 * (gram @ point) + point @ gram @ point
        pulls = weights / squares.clamp(min=float(guard)).sqrt()
        moved = pulls / pulls.sum()
        if float((moved - point).abs().max()) <= tolerance:
            return moved
        point = moved
    return point


def _dominant_update(gram: Tensor, weights: Tensor) -> int | None:
    distances = squared_distances(gram).sqrt()
    largest = gram.diagonal().max().clamp(min=0.0).sqrt()
    for k in range(len(gram)):
        apart = distances[k] > 1e-12 * largest
        here = weights[~apart].sum()
        pull = torch.where(apart, weights / distances[k].where(apart, torch.ones_like(weights)), 0.0)
        # || sum_j pull_j (Delta_j - Delta_k) ||^2
        force = pull @ gram @ pull - 2.0 * pull.sum() * (gram[k] @ pull) + pull.sum().square() * gram[k, k]
        if force <= here.square() * (1.0 + 1e-12):
            return k
    return None


def sort_clients(values: Tensor) -> list[Tensor]:
    """Sort every coordinate over the clients, ascending, by a network of pairwise minima and maxima.

    Args:
        values: float32 (clients, n); left untouched.

    Returns:
        ``clients`` tensors of shape (n,), the smallest values first.
    """
    rows = list(values.unbind(0))
    for i, j in _batcher_network(len(rows)):
        rows[i], rows[j] = torch.minimum(rows[i], rows[j]), torch.maximum(rows[i], rows[j])
    return rows


def _batcher_network(size: int) -> list[tuple[int, int]]:
    """Return the comparators of Batcher's odd-even merge sort (1968) for any size, lower index first."""
    pairs = []
    p = 1
    while p < size:
        k = p
        while k >= 1:
            for j in range(k % p, size - k, 2 * k):
                for i in range(min(k, size - j - k)):
                    if (i + j) // (2 * p) == (i + j + k) // (2 * p):
                        pairs.append((i + j, i + j + k))  # noqa: PERF401
            k //= 2
        p *= 2
    return pairs


def mean_nearest_median(rows: list[Tensor], count: int) -> Tensor:
    """Return the mean of the ``count`` values nearest to the median, coordinate by coordinate (Bulyan's second step).

    Args:
        rows: Sorted values, ascending, each (n,).
        count: Values to average. Choice: of equally near values the smaller one.
    """
    stacked = torch.stack(rows)
    middle = median_of_sorted(rows)
    # The nearest values form a window of the sorted ones: the one whose farther end is nearest.
    reaches = torch.stack(
        [torch.maximum(middle - stacked[i], stacked[i + count - 1] - middle) for i in range(len(rows) - count + 1)]
    )
    start = reaches.argmin(dim=0)
    # Where windows reach equally far, the nearest values are those of least distance in all: [0, 0] is not near 1 in
    # [0, 0, 1, 2, 2].
    tied = ((reaches == reaches.amin(dim=0)).sum(dim=0) > 1).nonzero().squeeze(1)
    if len(tied):
        apart = (stacked[:, tied] - middle[tied]).abs()
        totals = torch.stack([apart[i : i + count].sum(dim=0) for i in range(len(reaches))])
        least = reaches[:, tied] == reaches[:, tied].amin(dim=0)
        start[tied] = totals.where(least, torch.inf).argmin(dim=0)
    sums = torch.stack([stacked[i : i + count].sum(dim=0) for i in range(len(rows) - count + 1)])
    return sums.gather(0, start.unsqueeze(0)).squeeze(0) / count


def median_of_sorted(rows: list[Tensor]) -> Tensor:
    """Return the middle row, or the mean of the middle two."""
    clients = len(rows)
    upper = rows[clients // 2]
    return upper if clients % 2 else torch.lerp(rows[clients // 2 - 1], upper, 0.5)
