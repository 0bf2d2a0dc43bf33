"""Top-k trimming of a whole cohort: one exact cut per client, over the flattened update or per tensor."""

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import partial

from torch import Tensor

from fedproxy.strategies.aggregators.cohort import Cohort, Source
from fedproxy.strategies.aggregators.threads import side_by_side
from fedproxy.strategies.functional.trimming import Threshold, Trimmer, find_threshold, top_count

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
    cuts = side_by_side(partial(_cut_update, cohort, densities), range(len(cohort)))
    return {name: Trimmer(cut[name] for cut in cuts) for name in cohort.names}


def _cut_tensor(cohort: Cohort, densities: Sequence[float], name: str) -> Trimmer:
    """Cut one tensor of every client."""
    sources = cohort.read(name)
    size = math.prod(sources[0].shape)
    return Trimmer(
        find_threshold(source.parts, size, top_count(density, size))
        for source, density in zip(sources, densities, strict=True)
    )


def _cut_update(cohort: Cohort, densities: Sequence[float], client: int) -> dict[str, Threshold]:
    """Cut one client's whole update, and share the ties at the cut out to the tensors in their order."""
    delta = cohort.updates[client].delta

    def stream() -> Iterator[Tensor]:
        return itertools.chain.from_iterable(Source.of(delta, name).parts() for name in cohort.names)

    cut = find_threshold(stream, cohort.size, top_count(densities[client], cohort.size))
    cuts = dict.fromkeys(cohort.names, cut)
    if cut.ties is None:
        return cuts
    left = cut.ties
    for name in cohort.names:
        cuts[name] = Threshold(cut.magnitude, left)
        equal = sum(int((part.abs() == cut.magnitude).sum()) for part in Source.of(delta, name).parts())
        left = max(0, left - equal)
    return cuts
