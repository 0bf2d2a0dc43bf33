"""Which blocks cannot go without others: who reads whose keys and values, and what a family always needs."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedproxy.errors import ModelError
from fedproxy.models.decoder import OTHER_PARTS, Decoder
from fedproxy.models.structure import kind_of


@dataclass(frozen=True)
class Need:
    """Where one of ``users`` is kept, one of ``providers`` has to be."""

    users: frozenset[int] | None
    """Blocks; None: whatever is kept."""
    providers: frozenset[int]
    reason: str
    """Why; ends a sentence that starts with the blocks."""

    def met(self, kept: Collection[int]) -> bool:
        """Say whether a set of kept blocks is fine."""
        return (self.users is not None and self.users.isdisjoint(kept)) or not self.providers.isdisjoint(kept)


def known_needs(decoder: Decoder) -> tuple[Need, ...]:
    """Return what a family's configuration says about blocks that read what other blocks have left for them."""
    text = decoder.model.config.get_text_config()
    return (*_shared_keys(text), *_shared_indexers(text), *_shared_adapters(text))


def possible_needs(decoder: Decoder) -> list[tuple[Need, ...]]:
    """Return what a family may need that its configuration does not say, to be tried in this order."""
    text, last = decoder.model.config.get_text_config(), len(decoder) - 1
    types = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or [""] * len(decoder)
    by_type = _one_of_each(types)
    by_kind = _one_of_each([kind_of(block) for block in decoder.blocks])
    ends_alike = tuple(
        Need(frozenset({block}), frozenset(i for i in range(block, last + 1) if types[i] == types[last]), "ends alike")
        for block in range(last)
    )
    at_end, at_start = (Need(None, frozenset({block}), "is at an end") for block in (last, 0))
    return [by_type, by_kind, (*by_type, *ends_alike), (*by_type, at_end), (*by_type, at_start), (at_start, at_end)]


def check_needs(decoder: Decoder, kept: Collection[int]) -> None:
    """Check that no kept block lacks one that it needs.

    Raises:
        ModelError: If one does.
    """
    for need in known_needs(decoder):
        if not need.met(kept):
            listed = ", ".join(map(str, sorted(need.providers)))
            raise ModelError(
                f"compression: {type(decoder.model).__name__} needs block {listed}, which {need.reason}; {OTHER_PARTS}"
            )


def complete(kept: Sequence[int], needs: Sequence[Need], depth: int, scores: Tensor | None) -> tuple[int, ...]:
    """Return as many blocks that meet as many needs as can be, ascending; ``kept`` where it meets all of them.

    One block is exchanged for another until no exchange meets more. Of equal ones it is the exchange that loses the
    least score, or that moves a block the least where there are no scores.

    Args:
        kept: Blocks, without repeats.
        needs: What they have to meet.
        depth: The number of all blocks.
        scores: The blocks' worth, float64 (depth,), or None.
    """

    def unmet(blocks: Collection[int]) -> int:
        return sum(not need.met(blocks) for need in needs)

    def price(old: int, new: int) -> float:
        return abs(old - new) if scores is None else float(scores[old] - scores[new])

    chosen = set(kept)
    while missing := unmet(chosen):
        swaps = [
            (unmet(chosen - {old} | {new}), price(old, new), old, new)
            for old in sorted(chosen)
            for new in range(depth)
            if new not in chosen
        ]
        left, _, old, new = min(swaps, default=(missing, 0.0, 0, 0))
        if left >= missing:
            break
        chosen = chosen - {old} | {new}
    return tuple(sorted(chosen))


def in_step(kept: Sequence[int], period: int, depth: int, scores: Tensor | None) -> tuple[int, ...]:
    """Return as many blocks of which each keeps its place within a period: block i goes to a place j = i mod period.

    They have the highest sum of scores, or lie closest to ``kept`` where there are no scores; arguments as in
    :func:`complete`.
    """
    worth = (lambda new, old: -abs(old - kept[new])) if scores is None else (lambda new, old: float(scores[old]))
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]  # for each number of blocks, the best choice so far
    for old in range(depth):
        for new in range(min(len(best), len(kept)) - 1, -1, -1):
            if (old - new) % period:
                continue
            value = best[new][0] + worth(new, old)
            longer = (value, (*best[new][1], old))
            if new + 1 == len(best):
                best.append(longer)
            elif value > best[new + 1][0]:
                best[new + 1] = longer
    return best[len(kept)][1]


def _one_of_each(kinds: Sequence[Any]) -> tuple[Need, ...]:
    groups = {kind: frozenset(i for i, other in enumerate(kinds) if other == kind) for kind in kinds}
    return tuple(Need(None, blocks, "are of one kind") for blocks in groups.values())


def _shared_keys(text: Any) -> list[Need]:
    """Gemma 3n and 4: the last blocks read keys and values of the last one before them that has their type."""
    modes = getattr(text, "kv_sharing_modes", None) or []
    stores = {text.layer_types[block]: block for block, mode in enumerate(modes) if mode == "store"}
    readers = [block for block, mode in enumerate(modes) if mode == "reuse"]
    return [_reads(block, {stores[text.layer_types[block]]}, "keys and values") for block in readers]


def _shared_indexers(text: Any) -> list[Need]:
    """GLM with sparse attention: a block without an indexer of its own reads that of the last one before it."""
    types = getattr(text, "indexer_types", None) or []
    full = [block for block, kind in enumerate(types) if kind == "full"]
    readers = [block for block, kind in enumerate(types) if kind == "shared"]
    return [_reads(block, {max(i for i in full if i < block)}, "the index") for block in readers]


def _reads(block: int, providers: Collection[int], what: str) -> Need:
    return Need(frozenset({block}), frozenset(providers), f"block {block} reads {what} of")


def _shared_adapters(text: Any) -> list[Need]:
    """Zamba: a hybrid block is built with a second one alone; Zamba 2: each holds an adapter for all others."""
    if text.model_type == "zamba":
        hybrid = {block for block, kind in enumerate(text.layers_block_type) if kind == "hybrid"}
        return [Need(frozenset({i}), frozenset(hybrid - {i}), f"block {i} shares its weights with") for i in hybrid]
    blocks = getattr(text, "hybrid_layer_ids", None) or []
    return [Need(None, frozenset({block}), "the other hybrid blocks hold an adapter for") for block in blocks]
