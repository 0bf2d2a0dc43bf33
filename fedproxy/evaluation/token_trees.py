"""Many token sequences in one forward pass, every shared prefix computed once.

Sequences that begin alike (the choices of one question, questions behind the same solved examples) form a tree: each
tree node is one token, its position is its depth, and it attends to its ancestors and itself. One row of a batch is one
tree, so that a plain forward with a four-dimensional attention mask and explicit position ids gives, at every node, the
hidden state that the sequence alone would have had there. No cache is needed, and the vocabulary head is applied at
the nodes that are scored and nowhere else.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_HEAD_ROWS = 256
"""Scored nodes whose log-softmax is taken at once."""


@dataclass(frozen=True)
class Query:
    """A token sequence to score: the model reads ``tokens`` and should say ``targets`` at its last positions."""

    tokens: list[int]
    targets: list[int]
    """At most as many as ``tokens``; ``targets[-1]`` follows ``tokens[-1]``."""


@dataclass
class TokenTree:
    """Sequences of one row. ``parents`` of a new sequence's first own token are the nodes of its shared prefix."""

    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    branches: list[tuple[int, int, list[int]]] = field(default_factory=list)
    """(first own node, one past its last, nodes of the shared prefix), in the order added."""
    scored: list[tuple[int, list[int]]] = field(default_factory=list)
    """(index of the query, nodes whose next token it scores)."""
    _last: list[int] = field(default_factory=list)
    _path: list[int] = field(default_factory=list)

    @property
    def targets(self) -> int:
        """Number of target tokens scored in this tree."""
        return sum(len(nodes) for _, nodes in self.scored)

    def shared(self, tokens: Sequence[int]) -> int:
        """Return how many leading tokens the sequence shares with the one added last."""
        length = 0
        for ours, theirs in zip(self._last, tokens, strict=False):
            if ours != theirs:
                break
            length += 1
        return length

    def add(self, index: int, query: Query) -> None:
        """Add a query; queries must come in sorted order of their tokens, so that prefixes are shared in full."""
        shared, start = self.shared(query.tokens), len(self.tokens)
        own = query.tokens[shared:]
        end = start + len(own)
        prefix = self._path[:shared]
        if own:
            self.branches.append((start, end, prefix))
        self.tokens += own
        self.depths += range(shared, len(query.tokens))
        self._path, self._last = prefix + list(range(start, end)), query.tokens
        self.scored.append((index, self._path[len(query.tokens) - len(query.targets) :]))

    def visible(self) -> Tensor:
        """Return which nodes attend to which: bool (nodes, nodes), row = who looks."""
        seen = np.zeros((len(self.tokens), len(self.tokens)), dtype=bool)
        for start, end, prefix in self.branches:
            seen[start:end, prefix] = True
            seen[start:end, start:end] = np.tri(end - start, dtype=bool)
        return torch.from_numpy(seen)


def plant(queries: Sequence[Query], hidden_size: int, max_nodes: int) -> list[TokenTree]:
    """Pack queries into trees.

    A query joins the tree of its predecessor (in sorted order) where that saves more work than it costs: each shared
    token saves about 12 hidden_size^2 multiplications per block in the linear layers, each further pair of nodes in a
    row costs 2 hidden_size in attention, of which a masked kernel does about two thirds as many a second.

    Args:
        queries: What to score.
        hidden_size: Width of the model.
        max_nodes: No tree grows beyond this, unless one query alone does.
    """
    trees: list[TokenTree] = []
    for index in sorted(range(len(queries)), key=lambda i: queries[i].tokens):
        query = queries[index]
        if not (trees and _worth_joining(trees[-1], query.tokens, hidden_size, max_nodes)):
            trees.append(TokenTree())
        trees[-1].add(index, query)
    return trees


def _worth_joining(tree: TokenTree, tokens: list[int], hidden_size: int, max_nodes: int) -> bool:
    shared, nodes = tree.shared(tokens), len(tree.tokens)
    own = len(tokens) - shared
    further_pairs = (nodes + own) ** 2 - nodes**2 - len(tokens) ** 2
    return nodes + own <= max_nodes and 4 * hidden_size * shared >= further_pairs


def batches(trees: Sequence[TokenTree], batch_tokens: int, max_scored: int, overhead: int) -> list[list[TokenTree]]:
    """Return batches of trees of similar size, the largest first, for the least padding in the fewest forwards.

    Args:
        trees: All trees.
        batch_tokens: Most nodes of a batch, padding included; a larger tree runs alone.
        max_scored: Most scored nodes of a batch, which bounds the memory of the logits.
        overhead: What a forward costs beyond its nodes, in nodes.
    """
    order = sorted(trees, key=lambda tree: len(tree.tokens), reverse=True)
    cost, end = (
        [0] * (len(order) + 1),
        [0] * len(order),
    )  # of the cheapest split of order[i:], and its first batch's end
    for first in range(len(order) - 1, -1, -1):
        width, used, scored = len(order[first].tokens), 0, 0
        for last in range(first, len(order)):
            padded = width * (last - first + 1)
            used += len(order[last].tokens)
            scored += order[last].targets
            full = padded > batch_tokens or scored > max_scored or padded - used > 4 * overhead
            if full and last > first:
                break
            total = padded + overhead + cost[last + 1]
            if last == first or total < cost[first]:
                cost[first], end[first] = total, last + 1
    found, first = [], 0
    while first < len(order):
        found.append(order[first : end[first]])
        first = end[first]
    return found


@torch.no_grad()
def score(
    model: Any, trees: Sequence[TokenTree], queries: Sequence[Query], softmax_dtype: torch.dtype | None = None
) -> dict[int, tuple[float, bool]]:
    """Score the queries of one batch of trees with a single forward pass.

    Returns:
        By index of the query: the summed log-probability of its targets, and whether each of them is the likeliest.
    """
    width = max(len(tree.tokens) for tree in trees)
    nodes = [row * width + node for row, tree in enumerate(trees) for _, path in tree.scored for node in path]
    targets = [token for tree in trees for index, _ in tree.scored for token in queries[index].targets]
    where, which = torch.unique(torch.tensor(nodes, device=model.device), return_inverse=True)
    logits = _logits(model, trees, width, where)
    values, hits = _pick(logits, which.to(logits.device), torch.tensor(targets, device=logits.device), softmax_dtype)
    found, start = {}, 0
    for tree in trees:
        for index, path in tree.scored:
            end = start + len(path)
            found[index] = (float(sum(values[start:end])), all(hits[start:end]))
            start = end
    return found


@torch.no_grad()
def score_alone(model: Any, query: Query, softmax_dtype: torch.dtype | None = None) -> tuple[float, float]:
    """Score one query by a plain forward over its tokens, without a mask and without position ids.

    Returns:
        The summed log-probability of its targets, and the sum of the logits' standard deviations there: their scale.
    """
    first = len(query.tokens) - len(query.targets)
    where = torch.arange(first, len(query.tokens), device=model.device)
    logits = _scored_logits(model, where, input_ids=torch.tensor([query.tokens], device=model.device))
    targets = torch.tensor(query.targets, device=logits.device)
    values, _ = _pick(logits, torch.arange(len(targets), device=logits.device), targets, softmax_dtype)
    return float(sum(values)), float(logits.float().std(-1).sum())


def _logits(model: Any, trees: Sequence[TokenTree], width: int, where: Tensor) -> Tensor:
    """Return logits (scored nodes, vocabulary) of a forward over rows of trees, padded on the right."""
    device, rows = model.device, len(trees)
    tokens = torch.zeros(rows, width, dtype=torch.long)
    depths = torch.zeros(rows, width, dtype=torch.long)
    visible = torch.eye(width, dtype=torch.bool).repeat(rows, 1, 1)  # padding sees itself, or its softmax were 0 / 0
    for row, tree in enumerate(trees):
        size = len(tree.tokens)
        tokens[row, :size] = torch.tensor(tree.tokens)
        depths[row, :size] = torch.tensor(tree.depths)
        visible[row, :size, :size] = tree.visible()
    mask = torch.zeros(rows, 1, width, width, dtype=model.dtype)
    mask.masked_fill_(~visible[:, None], torch.finfo(model.dtype).min)
    return _scored_logits(
        model, where, input_ids=tokens.to(device), attention_mask=mask.to(device), position_ids=depths.to(device)
    )


def _scored_logits(model: Any, where: Tensor, **inputs: Tensor) -> Tensor:
    """Return the logits (scored tokens, vocabulary) of a forward; ``where`` indexes the flattened batch.

    A hook hands the vocabulary head only the hidden states of the scored tokens; whatever the model does to logits
    afterwards (scaling, soft-capping) still happens.
    """

    def keep_scored(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = inputs[0].flatten(0, 1)
        return (hidden[where.to(hidden.device)][None], *inputs[1:])

    with ExitStack() as stack:
        for head in output_heads(model):
            stack.callback(head.register_forward_pre_hook(keep_scored).remove)
            stack.enter_context(_without_autocast(head))
        output = model(**inputs, use_cache=False)
    logits: Tensor = output.logits
    if logits.shape[:2] != (1, len(where)):
        raise ValueError(f"logits of shape {tuple(logits.shape)} for {len(where)} scored tokens")
    return logits[0]


@contextmanager
def _without_autocast(head: Any) -> Iterator[None]:
    """Let a head compute in its weight's dtype: bfloat16 has steps of 1/8 where logits are about 20."""
    if not torch.is_autocast_enabled(head.weight.device.type):
        yield
        return
    plain, own = head.forward, vars(head).get("forward")

    def forward(hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            logits: Tensor = plain(hidden.to(head.weight.dtype))
        return logits

    head.forward = forward
    try:
        yield
    finally:
        if own is None:
            del head.forward
        else:
            head.forward = own


def output_heads(model: Any) -> list[Any]:
    """Return the model's vocabulary heads: one, or as many as a wrapper of several models says it has."""
    own = getattr(model, "output_heads", None)
    return [model.get_output_embeddings()] if own is None else list(own())


def _pick(logits: Tensor, which: Tensor, targets: Tensor, dtype: torch.dtype | None) -> tuple[list[float], list[bool]]:
    """Return each target's log-probability and whether it is the argmax; ``which`` (targets,) indexes ``logits``."""
    values = torch.empty(len(targets), dtype=torch.float64)
    hits = torch.empty(len(targets), dtype=torch.bool)
    for start in range(0, len(logits), _HEAD_ROWS):
        chunk = logits[start : start + _HEAD_ROWS]
        inside = ((which >= start) & (which < start + len(chunk))).nonzero().flatten()
        rows, wanted = which[inside] - start, targets[inside]
        values[inside.cpu()] = F.log_softmax(chunk, dim=-1, dtype=dtype)[rows, wanted].double().cpu()
        top = chunk[rows, wanted] == chunk.amax(-1)[rows]  # amax is much faster than argmax, which settles ties
        top[top.clone()] = chunk[rows[top]].argmax(-1) == wanted[top]
        hits[inside.cpu()] = top.cpu()
    return values.tolist(), hits.tolist()
