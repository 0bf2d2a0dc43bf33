"""LoRA rules as their papers state them, on one module: what becomes of its pairs (B_k, A_k), by dense products.

B_k is (out, rank) and A_k (rank, in) after training. The LoRA scaling s multiplies every product alike and is left out
where it does not matter. The aggregators give the same from small factors, without an (out, in) matrix.

A rule returns the new pair (B, A) and the change of the frozen weight, (out, in), that every party adds times s.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedproxy.strategies.functional.lowrank import Pair


def _mean(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    return torch.stack([p * tensor for tensor, p in zip(tensors, shares, strict=True)]).sum(dim=0)


def _mean_pair(pairs: Sequence[Pair], shares: Sequence[float]) -> Pair:
    return _mean([b for b, _ in pairs], shares), _mean([a for _, a in pairs], shares)


def best_factors(product: Tensor, rank: int) -> Pair:
    """Return B = U S^(1/2) and A = S^(1/2) V^T of the truncated SVD of a product (out, in)."""
    u, s, vh = torch.linalg.svd(product, full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]


def flora(start: Pair, pairs: Sequence[Pair], shares: Sequence[float]) -> tuple[Pair, Tensor]:
    """Stack the factors, [p_1 B_1, ..., p_K B_K] [A_1; ...; A_K], and start the adapter afresh with B = 0.

    FLoRA, Wang et al. 2024, arXiv 2409.05976. Deviation: A goes on from its shared start instead of a new draw.

    Args:
        start: The broadcast (B, A).
        pairs: The clients' pairs; ranks may differ.
        shares: p_k, sum 1.
    """
    b = torch.cat([p * b for (b, _), p in zip(pairs, shares, strict=True)], dim=1)
    a = torch.cat([a for _, a in pairs], dim=0)
    return (torch.zeros_like(start[0]), start[1]), b @ a


def fedex_lora(start: Pair, pairs: Sequence[Pair], shares: Sequence[float]) -> tuple[Pair, Tensor]:
    """Average the factors; the frozen weight takes sum_k p_k B_k A_k - B A, with which the mean is exact.

    FedEx-LoRA, Singhal et al. 2025, arXiv 2410.09432. Arguments as for :func:`flora`, ranks equal.
    """
    b, a = _mean_pair(pairs, shares)
    return (b, a), _mean([b_k @ a_k for b_k, a_k in pairs], shares) - b @ a


def flexlora(start: Pair, pairs: Sequence[Pair], shares: Sequence[float]) -> tuple[Pair, Tensor]:
    """Take the truncated SVD of sum_k p_k B_k A_k at the broadcast rank (FlexLoRA, Bai et al. 2024, arXiv 2402.11505).

    Arguments as for :func:`flora`.
    """
    product = _mean([b @ a for b, a in pairs], shares)
    return best_factors(product, len(start[1])), torch.zeros_like(product)


def ffa_lora(start: Pair, pairs: Sequence[Pair], shares: Sequence[float]) -> tuple[Pair, Tensor]:
    """Average B; A stays at its shared start, so that (sum_k p_k B_k) A is exact (FFA-LoRA, Sun et al. 2024).

    arXiv 2403.12313. Arguments as for :func:`flora`, ranks equal.
    """
    return (_mean_pair(pairs, shares)[0], start[1]), torch.zeros_like(start[0] @ start[1])


def rolora(start: Pair, pairs: Sequence[Pair], shares: Sequence[float], *, round_number: int) -> tuple[Pair, Tensor]:
    """Average B in odd rounds, A in even ones; the other factor rests (RoLoRA, Chen et al. 2024, arXiv 2409.02346).

    Arguments as for :func:`flora`, ranks equal; rounds count from 1.
    """
    b, a = _mean_pair(pairs, shares)
    return (b, start[1]) if round_number % 2 else (start[0], a), torch.zeros_like(start[0] @ start[1])


def fedsa_lora(start: Pair, pairs: Sequence[Pair], shares: Sequence[float]) -> tuple[Pair, Tensor]:
    """Average A, which all share; client k goes on from its own B_k (FedSA-LoRA, Guo et al. 2025, arXiv 2410.01463).

    Choice: the returned B, for the fused model, is the mean; the paper fuses nothing. Arguments as for :func:`flora`,
    ranks equal.
    """
    return _mean_pair(pairs, shares), torch.zeros_like(start[0] @ start[1])


def product_space(start: Pair, merged: Tensor, *, scaling: float) -> Pair:
    """Return the new pair of ``federation.space: product``: the best one, at the broadcast rank, of B A + merged / s.

    Args:
        start: The broadcast (B, A).
        merged: What any rule makes of the clients' changes s (B_k A_k - B A), (out, in).
        scaling: s.
    """
    b, a = start
    return best_factors(b @ a + merged / scaling, len(a))
