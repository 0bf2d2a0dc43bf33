"""Top-k trimming of a whole cohort: one exact cut per client, over the flattened update or per tensor."""

import itertools
import math
from collections.abc import Iterator, Sequence

from torch import Tensor

from fedproxy.protocol import Tensors
from fedproxy.strategies.aggregators.cohort import Cohort, Source
from fedproxy.strategies.functional.scratch import Scratch
from fedproxy.strategies.functional.trimming import Trimmer, find_threshold, top_count

SCOPES = ("global", "tensor")


def plan_trimming(cohort: Cohort, densities: Sequence[float], *, scope: str) -> dict[str, Trimmer]:
    """Find every client's cuts.

    Args:
        cohort: The round's updates.
        densities: Share of coordinates that each client keeps, in [0, 1].
        scope: ``global`` counts over the flattened update, ``tensor`` within each tensor.

    Returns:
        The trimmer of every tensor, to be fed the cohort's blocks in order.
    """
    if scope == "global":
        size = cohort.size
        cuts, scratch = [], Scratch()
        for update, density in zip(cohort.updates, densities, strict=True):

            def stream(delta: Tensors = update.delta) -> Iterator[Tensor]:
                return itertools.chain.from_iterable(Source.of(delta, name).parts() for name in cohort.names)

            cuts.append(find_threshold(stream, size, top_count(density, size), scratch=scratch))
        return dict.fromkeys(cohort.names, Trimmer(cuts))
    trimmers = {}
    for name in cohort.names:
        sources = cohort.read(name)
        count = math.prod(sources[0].shape)
        trimmers[name] = Trimmer(
            find_threshold(source.parts, count, top_count(density, count))
            for source, density in zip(sources, densities, strict=True)
        )
    return trimmers
