"""lm-eval's Hugging Face model with shared prefixes: the same answers as HFLM, in a fraction of the time."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fedproxy.evaluation.prompt_tokens import PromptTokens
from fedproxy.evaluation.token_trees import Query, TokenTree, batches, plant, score
from fedproxy.seeding import generator

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""lm-eval's encoded request: (context, continuation) as text, then both as tokens."""

_MAX_NODES = 1024
"""Largest tree that queries are gathered into; a longer single query still runs alone."""
_LOGITS = 2**26
"""Logits held at once, scored tokens times vocabulary (256 MiB in float32)."""

_OVERHEAD_CPU, _OVERHEAD_GPU = 40, 1000
"""What a forward costs beyond its tokens, in tokens: reading the weights, starting the kernels."""


class PrefixSharingLM(PromptTokens):
    """HFLM whose log-likelihood requests run every shared prefix once (see :mod:`fedproxy.evaluation.token_trees`).

    Tokenisation, truncation and all other request types are HFLM's. A model whose forward does not take a tree, found
    by comparing a small one with plain forwards, and sequences longer than an attention window go through HFLM as well.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        batch_size: int = 16,
        batch_tokens: int = 2048,
        max_length: int | None = None,
        autocast: torch.dtype | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Wrap a model.

        Args:
            model: A causal language model on its device.
            tokenizer: Its tokenizer.
            batch_size: Sequences per forward of HFLM's own methods.
            batch_tokens: Tokens per forward of shared prefixes, padding included.
            max_length: Longest sequence in tokens; None is the model's.
            autocast: HFLM's ``mixed_precision_dtype``; None for none.
            on_progress: Called with (requests done, requests in all).
        """
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_length=max_length,
            mixed_precision_dtype=autocast,
        )
        self.batch_tokens, self.on_progress = batch_tokens, on_progress
        self.answer_tokens: dict[tuple[str, str], int] = {}
        self.obstacle = sharing_obstacle(self.model) if self.backend == "causal" else "not a causal model"
        self._window = attention_window(self.model)

    @property
    def sharing(self) -> bool:
        """Whether prefixes are shared with this model; ``obstacle`` says why not."""
        return self.obstacle is None

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        self.answer_tokens |= {text: len(continuation) for text, _, continuation in requests if text is not None}
        rolling = override_bs is not None
        queries = {} if rolling or not self.sharing else self._queries(requests)
        found = self._score(queries, len(requests))
        rest = [index for index in range(len(requests)) if index not in found]
        if rest:
            plain = super()._loglikelihood_tokens([requests[i] for i in rest], disable_tqdm, override_bs)
            found |= dict(zip(rest, plain, strict=True))
        for index in queries:
            if (text := requests[index][0]) is not None:
                self.cache_hook.add_partial("loglikelihood", text, found[index])
        self._report(len(requests), len(requests))
        return [found[index] for index in range(len(requests))]

    def _queries(self, requests: Sequence[Request]) -> dict[int, Query]:
        """Return the requests that can share prefixes, truncated from the left like HFLM truncates them."""
        queries = {}
        for index, (_, context, continuation) in enumerate(requests):
            tokens = (context + continuation)[-(self.max_length + 1) : -1]
            fits = 0 < len(continuation) <= len(tokens) and (self._window is None or len(tokens) <= self._window)
            if fits:
                queries[index] = Query(tokens, continuation)
        return queries

    def _score(self, queries: dict[int, Query], total: int) -> dict[int, tuple[float, bool]]:
        order, asked = list(queries), list(queries.values())
        trees = plant(asked, hidden_size(self.model), min(_MAX_NODES, self.batch_tokens))
        found: dict[int, tuple[float, bool]] = {}
        scored = max(1, _LOGITS // vocabulary(self.model))
        overhead = _OVERHEAD_CPU if self.device.type == "cpu" else _OVERHEAD_GPU
        for batch in batches(trees, self.batch_tokens, scored, overhead):
            with torch.autocast(
                self.device.type, dtype=self.mixed_precision_dtype, enabled=self.mixed_precision_dtype is not None
            ):
                answers = score(self.model, batch, asked, self.softmax_dtype)
            found |= {order[position]: answer for position, answer in answers.items()}
            self._report(len(found), total)
        return found

    def _report(self, done: int, total: int) -> None:
        if self.on_progress is not None:
            self.on_progress(done, total)


def hidden_size(model: Any) -> int:
    """Return the width of the model's hidden states."""
    return int(model.config.get_text_config().hidden_size)


def vocabulary(model: Any) -> int:
    """Return the number of logits per token."""
    return int(model.get_output_embeddings().weight.shape[0])


def attention_window(model: Any) -> int | None:
    """Return the longest sequence in which every layer sees every earlier token, or None if there is no bound.

    In a longer one, layers with a sliding window or chunks hide early tokens, which a tree's mask does not tell.
    """
    config = model.config.get_text_config()
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((int(window) for window in windows if window), default=None)


def sharing_obstacle(model: Any) -> str | None:
    """Return why the model cannot run trees, or None if it can.

    Two small trees of different size, with a shared prefix, a repeated question and answers of one and several tokens,
    are compared with a plain forward per sequence. Recurrent layers, positional biases that ignore position ids and
    attention kernels without masks fail here, by an exception or by other numbers.
    """
    try:
        queries, trees = _small_trees(vocabulary(model))
        hidden_size(model)
        found = score(model, trees, queries)
        plain = [_plain_logprobs(model, query) for query in queries]
    except Exception as error:  # a forward that does not take what a tree needs may raise anything
        return f"{type(error).__name__}: {error}"
    precise = model.dtype in (torch.float32, torch.float64)
    for index, (logprobs, spread) in enumerate(plain):
        if abs(found[index][0] - logprobs) > (1e-3 if precise else 1e-1) * spread:
            return "its forward over a token tree differs from its forward over each sequence"
    return None


def _small_trees(words: int) -> tuple[list[Query], list[TokenTree]]:
    """Return three queries of one tree and one of a smaller one, of random tokens."""
    token = torch.randint(words, (24,), generator=generator(0, "sharing check")).tolist()
    prefix = token[:9]
    queries = [
        Query(prefix, token[9:10]),
        Query(prefix + token[10:12], token[10:13]),
        Query(prefix + token[13:17], token[13:18]),
        Query(token[18:22], token[22:23]),
    ]
    large, small = TokenTree(), TokenTree()
    for index in sorted(range(3), key=lambda i: queries[i].tokens):
        large.add(index, queries[index])
    small.add(3, queries[3])
    return queries, [large, small]


@torch.no_grad()
def _plain_logprobs(model: Any, query: Query) -> tuple[float, float]:
    """Return the summed log-probability of the targets, and the sum of the logits' standard deviations there."""
    logits: Tensor = model(torch.tensor([query.tokens], device=model.device), use_cache=False).logits[0]
    logits = logits[len(query.tokens) - len(query.targets) :].float()
    logprobs = logits.log_softmax(-1)
    picked = logprobs[torch.arange(len(query.targets)), torch.tensor(query.targets)]
    return float(picked.sum()), float(logits.std(-1).sum())
