"""Signs and votes, coordinate by coordinate: conflict, sign election and the merges that follow it."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fedproxy.strategies.functional.scratch import Scratch


def over_clients(factors: Tensor, rows: Tensor, *, out: Tensor) -> Tensor:
    """Return ``out``, float32 (n,), filled with the sum of the rows (clients, n) times factors (clients,)."""
    torch.mm(factors.unsqueeze(0), rows, out=out.unsqueeze(0))
    return out


def sign_sum(deltas: Tensor) -> Tensor:
    """Return the sum over clients of sign(Delta_kp), with sign(0) = 0.

    Args:
        deltas: float32 (clients, *shape).

    Returns:
        float32 (*shape), whole numbers in [-clients, clients].
    """
    return deltas.sign().sum(dim=0)


def conflict_map(deltas: Tensor, *, ignore_unmoved: bool = False) -> Tensor:
    """Return C_p = 1 - |sum_k sign(Delta_kp)| / K (FedProxy Eq 7), in [0, 1]; 0 for a single client.

    Args:
        deltas: float32 (clients, *shape), untrimmed updates.
        ignore_unmoved: Give 0 instead of the equation's 1 where no client moved.

    Returns:
        float32 (*shape).
    """
    clients = len(deltas)
    if clients == 1:
        return torch.zeros_like(deltas[0])
    conflict = 1.0 - sign_sum(deltas).abs() / clients
    return torch.where((deltas != 0).any(dim=0), conflict, 0.0) if ignore_unmoved else conflict


def ratio_vote_merge(
    scaled: Tensor, weights: Tensor, *, rho: float, eps: float, scratch: Scratch | None = None
) -> Tensor:
    """Merge scaled updates by H-TIES' ratio vote (FedProxy Eqs 12-14).

    gamma_p is +1 where pos_p / (neg_p + eps) >= rho, -1 where neg_p / (pos_p + eps) >= rho, else 0;
    m_p = sum of the d_kp whose sign is gamma_p / sum of their w_k.
    Choice: with s = pos - neg the first test is taken as s - (rho - 1) neg >= rho eps, which is the same in exact
    arithmetic and stays right in float32, where neg + eps would round to neg.

    Args:
        scaled: float32 (clients, n), d_k = w_k * trimmed update.
        weights: float32 (clients,), w_k, positive.
        rho: Least ratio of winning to losing mass, >= 1.
        eps: Guard of the ratio.
        scratch: Memory to work in; it also holds the result.

    Returns:
        float32 (n,).
    """
    scratch, (clients, n) = scratch or Scratch(), scaled.shape
    ones, work = torch.ones(clients), scratch.take(clients, n)
    total, elected, winning, losing, share = (
        scratch.take(n, slot=slot) for slot in ("total", "elected", "winning", "losing", "share")
    )
    # The sums run over products that are already rounded, so that equal and opposite values cancel to the bit.
    torch.sign(over_clients(ones, scaled, out=total), out=elected)
    agreeing = torch.mul(scaled, elected, out=work).clamp_(min=0.0)
    over_clients(ones, agreeing, out=winning)
    over_clients(weights, agreeing.sign_(), out=share)
    lead = total.abs_()
    torch.sub(winning, lead, out=losing)
    # 1 where the lead is reached, else 0, by arithmetic: masks of booleans cost several times as much on a CPU.
    wins = lead.sub_(losing, alpha=rho - 1.0).sub_(rho * eps).sign_().add_(1.0).clamp_(max=1.0)
    return winning.mul_(elected).mul_(wins).div_(share.clamp_(min=torch.finfo(share.dtype).tiny))


def elect_sign(deltas: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return sign(sum over clients of w_k Delta_kp): TIES' election by mass (Yadav et al. 2023, Sec. 3, step 2).

    Args:
        deltas: float32 (clients, n).
        weights: float32 (clients,), or None for one vote per unit of magnitude.

    Returns:
        float32 (n,) of -1, 0 and 1.
    """
    return ((torch.ones(len(deltas)) if weights is None else weights) @ deltas).sign_()


def agreeing_mean(
    deltas: Tensor,
    elected: Tensor,
    *,
    values: Tensor | None = None,
    counts: Tensor | None = None,
    scratch: Scratch | None = None,
) -> Tensor:
    """Return the mean of the non-zero entries whose sign was elected (TIES, step 3); 0 where no entry agrees.

    Args:
        deltas: float32 (clients, n), trimmed.
        elected: float32 (n,) of -1, 0 and 1.
        values: float32 (clients,), factor of each client in the sum; None is 1.
        counts: float32 (clients,), what each agreeing client adds to the divisor; None is 1.
        scratch: Memory to work in.

    Returns:
        float32 (n,).
    """
    ones, work = torch.ones(len(deltas)), (scratch or Scratch()).take(*deltas.shape)
    agree = torch.sign(deltas, out=work).mul_(elected).clamp_(min=0.0)
    divisor = (ones if counts is None else counts) @ agree
    total = (ones if values is None else values) @ agree.mul_(deltas)
    # Without an agreeing entry the sum is 0, and any divisor but 0 does.
    return total.div_(divisor.add_(divisor == 0))


def plain_ties(deltas: Tensor, *, scratch: Scratch | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Elect signs by mass and average the agreeing entries, all clients counting alike, from sums alone.

    With s the sum and m the sum of magnitudes, the agreeing entries sum to sign(s) (m + |s|) / 2; their number is
    (entries + sign(s) sum of signs) / 2, which is exact in whole numbers.

    Args:
        deltas: float32 (clients, n), trimmed.
        scratch: Memory to work in; it also holds the results.

    Returns:
        float32 (n,) merged values, 0 where no sign is elected; float32 (n,) elected signs; int64 (m,) indices of
        coordinates that have entries but elect no sign.
    """
    scratch, (clients, n) = scratch or Scratch(), deltas.shape
    ones, work = torch.ones(clients), scratch.take(clients, n)
    total, mass, elected, lead, entries = (
        scratch.take(n, slot=slot) for slot in ("total", "mass", "elected", "lead", "entries")
    )
    over_clients(ones, deltas, out=total)
    over_clients(ones, torch.abs(deltas, out=work), out=mass)
    torch.sign(total, out=elected)
    over_clients(ones, torch.sign(deltas, out=work), out=lead)
    over_clients(ones, work.abs_(), out=entries)
    waiting = _silent_with_entries(mass, elected, scratch.take(n, slot="silent"))
    count = entries.add_(lead.mul_(elected)).mul_(0.5).clamp_(min=1.0)
    return mass.add_(total.abs_()).mul_(0.5).mul_(elected).div_(count), elected, waiting


class Sums(NamedTuple):
    """What sums over clients say of one trimmed tensor, float32 (*shape) each."""

    total: Tensor
    """Of the values."""
    mass: Tensor
    """Of their magnitudes."""
    positive: Tensor
    """How many are positive."""
    negative: Tensor
    """How many are negative."""


def ties_of_sums(sums: Mapping[str, Sums]) -> dict[str, Tensor]:
    """Return what :func:`plain_ties` gives, from sums over clients alone; signs that tie are settled by the majority.

    Args:
        sums: By tensor.

    Returns:
        The mean of the values of the elected sign, float32 (*shape) by tensor; 0 where there are none.
    """
    majority = sum(float(own.total.sign().sum(dtype=torch.float64)) for own in sums.values())
    sign, merged = float((majority > 0) - (majority < 0)), {}
    for name, (total, mass, positive, negative) in sums.items():
        elected = torch.where(total == 0, sign, total.sign())
        agreeing = (mass + elected * total) / 2 * elected
        merged[name] = agreeing / torch.where(elected > 0, positive, negative).clamp(min=1.0)
    return merged


def _silent_with_entries(mass: Tensor, elected: Tensor, work: Tensor) -> Tensor:
    open_ = torch.sign(mass, out=work).addcmul_(elected, elected, value=-1.0)
    return open_.nonzero().squeeze(1) if float(torch.dot(open_, open_)) else open_.new_empty(0, dtype=torch.int64)


def undecided(deltas: Tensor, elected: Tensor) -> Tensor:
    """Return the indices, int64, of coordinates that have entries but elect no sign.

    Args:
        deltas: float32 (clients, n).
        elected: float32 (n,) of -1, 0 and 1.
    """
    silent = (elected == 0).nonzero().squeeze(1)
    return silent[(deltas[:, silent] != 0).any(dim=0)] if len(silent) else silent
