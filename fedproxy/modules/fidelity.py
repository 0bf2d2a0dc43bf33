"""How far a proxy is from its target on text: divergence, perplexity and speed, from one pass of both."""

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from fedproxy.errors import DataError
from fedproxy.models.mapped import release

_CHUNK = 256
"""Tokens whose distributions over the vocabulary are compared at a time."""


@dataclass(frozen=True)
class Fidelity:
    """Proxy against target at the positions that predict a token of the text."""

    tokens: int
    """Predicted tokens."""
    kl: float
    """KL(target || proxy) in nats per token."""
    target_perplexity: float
    proxy_perplexity: float
    """exp of the mean negative log-likelihood per token."""
    target_tokens_per_second: float
    proxy_tokens_per_second: float
    """Forward passes with the head, real tokens per second on this machine."""


@torch.no_grad()
def compare(target: PreTrainedModel, proxy: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> Fidelity:
    """Run both models, in turns, over public text and compare their next-token distributions.

    Args:
        target: The teacher, say.
        proxy: A model of the same vocabulary.
        batches: ``input_ids`` and ``attention_mask``, int64 (batch, length), padded on the right; small batches, since
            logits of all positions are held.

    Raises:
        DataError: If no text has two tokens.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    seconds, tokens, real = [0.0, 0.0], 0, 0
    for batch in batches:
        mask = batch["attention_mask"].bool()
        predicts = torch.zeros_like(mask)
        predicts[:, :-1] = mask[:, :-1] & mask[:, 1:]
        following = batch["input_ids"].roll(-1, dims=1)[predicts]
        logits = []
        for which, model in enumerate((target, proxy)):
            started = time.perf_counter()
            logits.append(_logits(model, batch)[predicts])
            seconds[which] += time.perf_counter() - started
            release()  # the two need not be in memory together
        for start in range(0, len(following), _CHUNK):
            p, q, goal = (part[start : start + _CHUNK] for part in (*logits, following))
            sums += _sums(p, q, goal.to(p.device)).cpu()
        tokens, real = tokens + len(following), real + int(mask.sum())
    if not tokens:
        raise DataError("compression.calibration: no held-out text has two tokens; give rows with text")
    kl, nll_target, nll_proxy = (sums / tokens).tolist()
    return Fidelity(tokens, kl, math.exp(nll_target), math.exp(nll_proxy), real / seconds[0], real / seconds[1])


def _logits(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    ids, mask = (batch[name].to(model.device) for name in ("input_ids", "attention_mask"))
    logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    if logits.device.type == "cuda":
        torch.cuda.synchronize(logits.device)
    return logits


def _sums(target: Tensor, proxy: Tensor, following: Tensor) -> Tensor:
    """Return the sums of KL(target || proxy) and of both negative log-likelihoods, float64 (3,).

    Args:
        target: Logits (tokens, vocabulary).
        proxy: Logits of the same shape.
        following: The tokens that came, int64 (tokens,).
    """
    log_p, log_q = (F.log_softmax(logits.float(), dim=-1) for logits in (target, proxy.to(target.device)))
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    likelihoods = [-log.gather(1, following[:, None])[:, 0] for log in (log_p, log_q)]
    return torch.stack([part.double().sum() for part in (kl, *likelihoods)])
