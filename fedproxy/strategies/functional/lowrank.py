"""Exact arithmetic on products of LoRA factors, s B A per weight matrix, without a dense matrix per client."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedproxy.errors import ClientError

Pair = tuple[Tensor, Tensor]
"""(B, A): (out, rank) and (rank, in)."""
A_SUFFIX, B_SUFFIX = ".lora_A.weight", ".lora_B.weight"
"""PEFT's names: A is (rank, in_features), B is (out_features, rank)."""


def lora_modules(state: Mapping[str, Tensor]) -> list[str]:
    """Return the sorted names of the modules that have a LoRA pair in ``state``.

    Raises:
        ClientError: If one half of a pair is missing.
    """
    a = {name.removesuffix(A_SUFFIX) for name in state if name.endswith(A_SUFFIX)}
    b = {name.removesuffix(B_SUFFIX) for name in state if name.endswith(B_SUFFIX)}
    if a != b:
        module = min(a ^ b)
        raise ClientError(
            f"LoRA module {module!r} must have both {A_SUFFIX[1:]} and {B_SUFFIX[1:]}, got one; send both factors"
        )
    return sorted(a)


def product_inner(left: Pair, right: Pair) -> float:
    """Return <B_i A_i, B_j A_j>_F = trace((B_i^T B_j)(A_j A_i^T)), in float64.

    Args:
        left: (B_i, A_i), float (out, rank_i) and (rank_i, in).
        right: (B_j, A_j), float (out, rank_j) and (rank_j, in).
    """
    (b_i, a_i), (b_j, a_j) = left, right
    return float(((b_i.double().T @ b_j.double()) * (a_i.double() @ a_j.double().T)).sum())


def product_gram(pairs: Sequence[Pair]) -> Tensor:
    """Return the inner products of the products B_k A_k, float64 (clients, clients), symmetric to the bit."""
    gram = torch.zeros(len(pairs), len(pairs), dtype=torch.float64)
    for i, left in enumerate(pairs):
        for j in range(i, len(pairs)):
            gram[i, j] = gram[j, i] = product_inner(left, pairs[j])
    return gram


def factor_mean_error(
    states: Sequence[Mapping[str, Tensor]], weights: Sequence[float] | Tensor, scaling: float
) -> float:
    """Return the relative error of averaging factors instead of products, over all LoRA modules.

    || sum p_k s B_k A_k - s (sum p_k B_k)(sum p_k A_k) || / || sum p_k s B_k A_k ||, Frobenius. The numerator is
    taken as the norm of sum p_k (B_k - B)(A_k - A), which equals it where weights sum to 1 and does not cancel.

    Args:
        states: The clients' states, PEFT names ``<module>.lora_A.weight`` (rank, in) and ``<module>.lora_B.weight``
            (out, rank); other tensors are ignored.
        weights: Client weights; scaled to sum to 1.
        scaling: s. It cancels in the ratio unless it is 0.

    Returns:
        The error; 0 where the product mean is zero or there is no LoRA module.

    Raises:
        ClientError: If one half of a LoRA pair is missing.
    """
    shares = torch.as_tensor(weights, dtype=torch.float64)
    shares = shares / shares.sum()
    outer = torch.outer(shares, shares)
    missed, total = 0.0, 0.0
    for module in lora_modules(states[0]):
        b = torch.stack([state[module + B_SUFFIX].double() for state in states])
        a = torch.stack([state[module + A_SUFFIX].double() for state in states])
        b_off, a_off = (t - torch.tensordot(shares, t, dims=1) for t in (b, a))
        missed += float((outer * product_gram(list(zip(b_off, a_off, strict=True)))).sum())
        total += float((outer * product_gram(list(zip(b, a, strict=True)))).sum())
    if scaling == 0.0 or total <= 0.0:
        return 0.0
    return math.sqrt(max(0.0, missed) / total)


def stack_pairs(pairs: Sequence[Pair], coefficients: Sequence[float]) -> Pair:
    """Return factors of sum_k c_k B_k A_k: B = [c_1 B_1, ..., c_K B_K] and A = [A_1; ...; A_K].

    Args:
        pairs: (B_k, A_k), (out, rank_k) and (rank_k, in); ranks may differ.
        coefficients: c_k.

    Returns:
        float64 (out, sum of ranks) and (sum of ranks, in).
    """
    left = torch.cat([b.double() * c for (b, _), c in zip(pairs, coefficients, strict=True)], dim=1)
    return left, torch.cat([a.double() for _, a in pairs], dim=0)


def refactor(pair: Pair, rank: int) -> Pair:
    """Return the best factors of a given rank: B = U S^(1/2), A = S^(1/2) V^T of the product's truncated SVD.

    The SVD is taken by QR of both factors, so that no (out, in) matrix is formed. A rank above what the product has
    is filled up with zeros.

    Args:
        pair: (B, A), (out, stacked rank) and (stacked rank, in).
        rank: Rank of the result.

    Returns:
        float64 (out, rank) and (rank, in).
    """
    b, a = (factor.double() for factor in pair)
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    kept = min(rank, len(s))
    root = s[:kept].sqrt()
    new_b = b.new_zeros(b.shape[0], rank)
    new_a = a.new_zeros(rank, a.shape[1])
    new_b[:, :kept] = (q_b @ u[:, :kept]) * root
    new_a[:kept] = root.unsqueeze(1) * (vh[:kept] @ q_a.T)
    return new_b, new_a


def mean_residual(pairs: Sequence[Pair], shares: Sequence[float]) -> Pair:
    """Return factors of what averaging factors misses: sum p_k B_k A_k - (sum p_k B_k)(sum p_k A_k) (FedEx-LoRA).

    It equals sum over k < K of p_k (B_k - B)(A_k - A_K), because the p_k (B_k - B) sum to zero: rank (K - 1) r.

    Args:
        pairs: (B_k, A_k) of equal ranks.
        shares: p_k, sum 1.

    Returns:
        float64 (out, (K - 1) r) and ((K - 1) r, in).
    """
    mean = sum((b.double() * p for (b, _), p in zip(pairs, shares, strict=True)), torch.zeros(()))
    last = pairs[-1][1].double()
    apart = [(b.double() - mean, a.double() - last) for b, a in pairs[:-1]]
    if not apart:
        b, a = pairs[0]
        return b.new_zeros(b.shape[0], 0, dtype=torch.float64), a.new_zeros(0, a.shape[1], dtype=torch.float64)
    return stack_pairs(apart, list(shares)[:-1])


def refactor_dense(matrix: Tensor, rank: int) -> Pair:
    """Return the best factors of a given rank of a dense matrix, as :func:`refactor` does for a product.

    The leading singular vectors come from the eigenvectors of the smaller Gram matrix.

    Args:
        matrix: (out, in).
        rank: Rank of the result.

    Returns:
        float64 (out, rank) and (rank, in).
    """
    wide = matrix.double()
    if wide.shape[0] > wide.shape[1]:
        b, a = refactor_dense(wide.T, rank)
        return a.T.contiguous(), b.T.contiguous()
    vectors = torch.linalg.eigh(wide @ wide.T).eigenvectors.flip(1)[:, :rank]
    return refactor((vectors, vectors.T @ wide), rank)
