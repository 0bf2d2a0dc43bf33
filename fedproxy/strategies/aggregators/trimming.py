"""Top-k trimming of a whole cohort: one exact cut per client, over the flattened update or per tensor."""

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import partial

from torch import Tensor

from fedproxy.strategies.aggregators.cohort import Cohort, Source
from fedproxy.strategies.aggregators.threads import side_by_side
from fedproxy.strategies.functional.trimming import (
    Found,
    Threshold,
    Trimmer,
    bracket_cut,
    find_threshold,
    gather,
    settle_cut,
    top_count,
)

SCOPES = ("global", "tensor")


def plan_trimming(cohort: Cohort, densities: Sequence[float], *, scope: str) -> dict[str, Trimmer]:
    """Find every client's cuts.

    Args:
        cohort: The round's updates.
        densities: Share of coordinates that each client keeps, in [0, 1].
        scope: ``global`` counts over the flattened update, ``tensor`` within each tensor.

    Returns:
        The trimmer of every tensor, to be fed the tensor's blocks in order.
    """
    if scope == "tensor":
        return dict(zip(cohort.names, side_by_side(partial(_cut_tensor, cohort, densities), cohort.names), strict=True))
    counts = [top_count(density, cohort.size) for density in densities]
    brackets = side_by_side(partial(_bracket_update, cohort, counts), range(len(cohort)))
    found = side_by_side(partial(_gather_tensor, cohort, brackets), cohort.names)
    cuts = side_by_side(partial(_cut_update, cohort, counts, brackets, found), range(len(cohort)))
    return {name: Trimmer(cut[name] for cut in cuts) for name in cohort.names}


def _cut_tensor(cohort: Cohort, densities: Sequence[float], name: str) -> Trimmer:
    """Cut one tensor of every client."""
    sources = cohort.read(name)
    size = math.prod(sources[0].shape)
    return Trimmer(
        find_threshold(source.parts, size, top_count(density, size))
        for source, density in zip(sources, densities, strict=True)
    )


def _stream(cohort: Cohort, client: int) -> Iterator[Tensor]:
    delta = cohort.updates[client].delta
    return itertools.chain.from_iterable(Source.of(delta, name).parts() for name in cohort.names)


def _bracket_update(cohort: Cohort, counts: Sequence[int], client: int) -> tuple[float, float] | None:
    return bracket_cut(partial(_stream, cohort, client), cohort.size, counts[client])


def _gather_tensor(cohort: Cohort, brackets: Sequence[tuple[float, float] | None], name: str) -> list[Found]:
    """Look through one tensor of every client whose cut is still open."""
    return [
        gather(source.parts(), bracket) if bracket is not None else (0, [])
        for source, bracket in zip(cohort.read(name), brackets, strict=True)
    ]


def _cut_update(
    cohort: Cohort,
    counts: Sequence[int],
    brackets: Sequence[tuple[float, float] | None],
    found: Sequence[Sequence[Found]],
    client: int,
) -> dict[str, Threshold]:
    """Cut one client's whole update, and share the ties at the cut out to the tensors in their order."""
    parts = [tensor[client] for tensor in found]
    cut = settle_cut(partial(_stream, cohort, client), cohort.size, counts[client], parts)
    cuts = dict.fromkeys(cohort.names, cut)
    if cut.ties is None:
        return cuts
    low, high = brackets[client] or (0.0, 0.0)
    left, delta = cut.ties, cohort.updates[client].delta
    for name, (_, within) in zip(cohort.names, parts, strict=True):
        if low < cut.magnitude < high:
            equal = sum(int((piece == cut.magnitude).sum()) for piece in within)
        else:
            equal = sum(int((part.abs() == cut.magnitude).sum()) for part in Source.of(delta, name).parts())
        cuts[name] = Threshold(cut.magnitude, None if equal <= left else left)
        left = max(0, left - equal)
    return cuts
