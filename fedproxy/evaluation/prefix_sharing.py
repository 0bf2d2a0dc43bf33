"""lm-eval's Hugging Face model with shared prefixes: the same answers as HFLM, in a fraction of the time."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from fedproxy.errors import first_line
from fedproxy.evaluation.generation import generate
from fedproxy.evaluation.prompt_tokens import PromptTokens
from fedproxy.evaluation.token_trees import Query, TokenTree, batches, plant, score, score_alone

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""lm-eval's encoded request: (context, continuation) as text, then both as tokens."""

_MAX_NODES = 1024
"""Largest tree that queries are gathered into; a longer single query still runs alone."""
_LOGITS = 2**26
"""Logits held at once, scored tokens times vocabulary (256 MiB in float32)."""

_NOISE, _HALF_NOISE = 3e-5, 1e-1
"""Largest difference that rounding makes per token, in standard deviations of its logits: in float32, and below it."""
_SUMMED, _LEAST = 1e-6, 2e-5
"""What rounding of the sum adds: as a share of it, and in nats. Seen in all: 4e-5 nats over 90 small models."""
_GREEDY = {"until", "max_gen_toks", "do_sample", "temperature"}
"""What a request may say about generation where greedy search is all that it asks for."""
_NO_MATTER = {
    "bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_p", "top_k", "max_length",
    "max_new_tokens", "use_cache", "output_attentions", "output_hidden_states", "transformers_version",
    "_from_model_config",
}  # fmt: skip
"""What a model's own settings for generation may say without changing what greedy search finds."""
_OVERHEAD_CPU, _OVERHEAD_GPU = 40, 1000
"""What a forward costs beyond its tokens, in tokens: reading the weights, starting the kernels."""


class PrefixSharingLM(PromptTokens):
    """HFLM whose log-likelihood requests run every shared prefix once (see :mod:`fedproxy.evaluation.token_trees`).

    Greedy answers are generated side by side (:mod:`fedproxy.evaluation.generation`). Tokenisation, truncation and all
    else are HFLM's. A model whose forward does not take a tree, found
    by comparing some of the requests with plain forwards, and sequences longer than an attention window go through
    HFLM as well.
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
        self.cut: set[tuple[str, str]] = set()
        self.obstacle = None if self.backend == "causal" else "it is not a causal model"
        self._window = attention_window(self.model)

    @property
    def sharing(self) -> bool:
        """Whether prefixes are shared with this model, as far as requests have shown; ``obstacle`` says why not."""
        return self.obstacle is None

    def loglikelihood_of_tokens(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        """Return the log-likelihood, in nats, of each continuation after its context, both as tokens."""
        return [value for value, _ in self._loglikelihood_tokens([(None, *pair) for pair in pairs])]

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        self.answer_tokens |= {text: len(continuation) for text, _, continuation in requests if text is not None}
        rolling = override_bs is not None
        queries = {} if rolling or not self.sharing else self._queries(requests)
        found = self._score(queries, len(requests)) if queries else {}
        for index in found:
            if (text := requests[index][0]) is not None:
                self.cache_hook.add_partial("loglikelihood", text, found[index])
        rest = [index for index in range(len(requests)) if index not in found]
        if rest:
            plain = super()._loglikelihood_tokens([requests[i] for i in rest], disable_tqdm, override_bs)
            found |= dict(zip(rest, plain, strict=True))
        self._report(len(requests), len(requests))
        return [found[index] for index in range(len(requests))]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue contexts as HFLM does; side by side where nothing but greedy search is asked."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(index)
        found: dict[int, str] = {}
        for members in groups.values():
            contexts = [requests[index].args[0] for index in members]
            texts = self._continued(contexts, requests[members[0]].args[1], len(requests), len(found))
            for index, text in zip(members, texts, strict=True) if texts is not None else ():
                found[index] = text
                self.cache_hook.add_partial("generate_until", requests[index].args, text)
        rest = [index for index in range(len(requests)) if index not in found]
        if rest:
            found |= dict(
                zip(rest, super().generate_until([requests[i] for i in rest], disable_tqdm=disable_tqdm), strict=True)
            )
        self._report(len(requests), len(requests))
        return [found[index] for index in range(len(requests))]

    def _continued(self, contexts: Sequence[str], asked: Any, total: int, before: int) -> list[str] | None:
        """Return the texts that follow contexts; None where HFLM has to make them."""
        options = normalize_gen_kwargs(asked, self.max_gen_toks)
        limit, own = options["max_gen_toks"], self.model.generation_config
        greedy = not options["do_sample"] and set(options) <= _GREEDY and set(own.to_diff_dict()) <= _NO_MATTER
        if not greedy or self.backend != "causal" or self.think_end_token is not None or limit >= self.max_length:
            return None
        encoded = [self.tok_batch_encode([text], "left", self.max_length - limit, self.truncation) for text in contexts]
        prompts = [ids[0].tolist() for ids, _ in encoded]
        if not all(prompts):
            return None
        until = handle_stop_sequences(options["until"], self.tok_decode(self.eot_token_id, skip_special_tokens=False))
        ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
        dtype = self.mixed_precision_dtype
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            answers, _ = generate(
                self.model,
                prompts,
                [limit] * len(prompts),
                ends=[end for end in ends if end is not None],
                batch_tokens=self.batch_tokens,
                stops=lambda tokens: any(term and term in self.tok_decode(tokens) for term in until),
                progress=lambda done: self._report(before + done, total),
            )
        return [postprocess_generated_text(self.tok_decode(answer), until, None) for answer in answers]

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
        """Score queries with shared prefixes; return nothing where some show that this model cannot share."""
        order, asked = list(queries), list(queries.values())
        try:
            trees = plant(asked, hidden_size(self.model), min(_MAX_NODES, self.batch_tokens))
            scored = max(1, _LOGITS // vocabulary(self.model))
        except Exception as error:  # a configuration or a head that is not where others have it
            self.obstacle = f"{type(error).__name__}: {first_line(error)}"
            return {}
        overhead = _OVERHEAD_CPU if self.device.type == "cpu" else _OVERHEAD_GPU
        forwards = batches(trees, self.batch_tokens, scored, overhead)
        telling = most_telling(forwards, asked)
        forwards.sort(key=lambda batch: telling.isdisjoint(_members(batch)))  # what shows an obstacle comes first
        found: dict[int, tuple[float, bool]] = {}
        for batch in forwards:
            checked = telling & _members(batch)
            try:
                answers = self._answers(batch, asked, checked)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # a forward that does not take what a tree needs may raise anything
                if not checked:
                    raise
                self.obstacle = f"{type(error).__name__}: {first_line(error)}"
            if self.obstacle is not None:
                return {}
            found |= {order[position]: answer for position, answer in answers.items()}
            self._report(len(found), total)
        return found

    def _answers(
        self, batch: Sequence[TokenTree], asked: Sequence[Query], checked: set[int]
    ) -> dict[int, tuple[float, bool]]:
        """Score one batch, and set ``obstacle`` where a plain forward over one of ``checked`` says something else."""
        dtype = self.mixed_precision_dtype
        precise = dtype is None and self.model.dtype in (torch.float32, torch.float64)
        noise = _NOISE if precise and torch.get_float32_matmul_precision() == "highest" else _HALF_NOISE
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            answers = score(self.model, batch, asked, self.softmax_dtype)
            for index in sorted(checked):
                plain, scale = score_alone(self.model, asked[index], self.softmax_dtype)
                gap = abs(answers[index][0] - plain)
                if not gap <= noise * scale + _SUMMED * abs(plain) + _LEAST:
                    self.obstacle = f"over shared prefixes log-likelihoods are {gap:.2g} nats from a plain forward's"
        return answers

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


def most_telling(forwards: Sequence[Sequence[TokenTree]], queries: Sequence[Query]) -> set[int]:
    """Return the queries, at most three, in which a model that cannot run trees gives itself away.

    Windows and chunks, whatever a configuration calls them, hide early tokens of the longest one. Recurrent states, and
    layers that choose among a row's tokens, are wrong most where most tokens of other sequences come before. What
    depends on the longest sequence of a batch is wrong in the shortest one beside it.
    """
    unseen = {
        index: path[-1] + 1 - len(queries[index].tokens)
        for batch in forwards
        for tree in batch
        for index, path in tree.scored
    }
    longest = max(unseen, key=lambda index: len(queries[index].tokens))
    beside = next(members for batch in forwards if longest in (members := _members(batch)))
    shortest = min(sorted(beside), key=lambda index: len(queries[index].tokens))
    return {longest, max(unseen, key=lambda index: unseen[index]), shortest}


def _members(batch: Sequence[TokenTree]) -> set[int]:
    return {index for tree in batch for index, _ in tree.scored}
