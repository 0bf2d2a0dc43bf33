"""Exact arithmetic on products of LoRA factors, s B A per weight matrix, without a dense matrix per client."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedproxy.errors import ClientError

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


def product_inner(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> float:
    """Return <B_i A_i, B_j A_j>_F = trace((B_i^T B_j)(A_j A_i^T)), in float64.

    Args:
        left: (B_i, A_i), float (out, rank_i) and (rank_i, in).
        right: (B_j, A_j), float (out, rank_j) and (rank_j, in).
    """
    (b_i, a_i), (b_j, a_j) = left, right
    return float(((b_i.double().T @ b_j.double()) * (a_i.double() @ a_j.double().T)).sum())


def product_gram(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the inner products of the products B_k A_k, float64 (clients, clients), symmetric to the bit."""
    gram = torch.zeros(len(pairs), len(pairs), dtype=torch.float64)
    for i, left in enumerate(pairs):
        for j in range(i, len(pairs)):
            gram[i, j] = gram[j, i] = product_inner(left, pairs[j])
    return gram


def factor_mean_error(
    states: Sequence[Mapping[str, Tensor]], weights: Sequence[float] | Tensor, scaling: float
) -> float:
    """Return the relative error of averaging factors instead of products (PAPER 6.4), over all LoRA modules.

    || sum p_k s B_k A_k - s (sum p_k B_k)(sum p_k A_k) || / || sum p_k s B_k A_k ||, Frobenius. The numerator is
    taken as the norm of sum p_k (B_k - B)(A_k - A), which equals it where weights sum to 1 and does not cancel.

    Args:
        states: The clients' states, PEFT names ``<module>.lora_A.weight`` (rank, in) and ``<module>.lora_B.weight``
            (out, rank); other tensors are ignored.
        weights: Client weights; scaled to sum to 1.
        scaling: s = alpha / rank. It cancels in the ratio unless it is 0.

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
