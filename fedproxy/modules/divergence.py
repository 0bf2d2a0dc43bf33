"""Divergences between the next-token distributions of two models, over the whole vocabulary or its likeliest part."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

DivergenceName = Literal["forward_kl", "reverse_kl", "jensen_shannon"]
CHUNK_ELEMENTS = 2**23
"""Logits that are held at a time: 32 MiB in float32."""


class Distribution(Protocol):
    """A teacher's next-token distributions, read a few tokens at a time."""

    def outcomes(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Return what :func:`log_outcomes` gives for tokens [start, stop), and the index it was given."""
        ...


def log_outcomes(logits: Tensor, index: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """Return log-probabilities, float32 (tokens, outcomes).

    Without an index every entry of the vocabulary is an outcome. With one, the k named entries are outcomes and all
    others together are one more, the last; k = vocabulary has no last one. Its mass is summed in the log domain, so it
    never underflows.

    Args:
        logits: (tokens, vocabulary).
        index: int64 (tokens, k), different entries in each row, or None.
        temperature: > 0; logits are divided by it.
    """
    scaled = logits.float() / temperature
    if index is None:
        return F.log_softmax(scaled, dim=-1)
    named = scaled.gather(1, index)
    if index.shape[1] < scaled.shape[1]:
        rest = scaled.scatter(1, index, -math.inf).logsumexp(dim=1, keepdim=True)
        named = torch.cat([named, rest], dim=1)
    return F.log_softmax(named, dim=-1)


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p || q) in nats, (tokens): p is the teacher, so the student must cover all that the teacher says.

    Args:
        log_p: Teacher's log-probabilities (tokens, outcomes).
        log_q: Student's log-probabilities, same shape.
    """
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(q || p) in nats, (tokens): the student q may leave out what the teacher p finds unlikely."""
    return forward_kl(log_q, log_p)


def jensen_shannon(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2 in nats, (tokens): symmetric, at most log 2."""
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return (forward_kl(log_p, log_m) + forward_kl(log_q, log_m)) / 2


DIVERGENCES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
}


def mean_divergence(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    teacher: Distribution,
    *,
    vocabulary: int,
    kind: DivergenceName = "forward_kl",
    temperature: float = 1.0,
) -> Tensor:
    """Return the mean divergence per token in nats, times the squared temperature, 0-dim float32.

    The factor keeps the gradient's size when both sides are softened (Hinton et al. 2015, arXiv 1503.02531, Sec. 2).
    Tokens are gone through in chunks whose gradient is taken at once, so that logits of all tokens never exist.

    Args:
        hidden: What enters the student's output head, (tokens, hidden); the gradient flows to it alone.
        head: Maps (chunk, hidden) to logits (chunk, vocabulary); frozen.
        teacher: Its distributions, softened by the same temperature.
        vocabulary: Entries of the vocabulary.
        kind: Which divergence.
        temperature: > 0.
    """
    chunk = max(1, CHUNK_ELEMENTS // vocabulary)

    def of(part: Tensor, start: int) -> Tensor:
        log_p, index = teacher.outcomes(start, start + len(part))
        return DIVERGENCES[kind](log_p, log_outcomes(head(part), index, temperature)).sum()

    mean: Tensor = _Chunked.apply(hidden, of, chunk)  # type: ignore[no-untyped-call]
    return mean * temperature**2


class _Chunked(torch.autograd.Function):
    """Mean over rows of a sum over chunks of rows; the gradient is computed in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, of: Callable[[Tensor, int], Tensor], chunk: int) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(rows) if wanted else None
        total = torch.zeros((), device=rows.device)
        for start in range(0, len(rows), chunk):
            part = rows[start : start + chunk].detach()
            with torch.set_grad_enabled(wanted):
                loss = of(part.requires_grad_(wanted), start)
            if gradient is not None:
                gradient[start : start + chunk] = torch.autograd.grad(loss, part)[0]
            total += loss.detach()
        ctx.gradient, ctx.count = gradient, len(rows)
        return total / len(rows)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(outer[0].to(gradient.dtype) / ctx.count), None, None
