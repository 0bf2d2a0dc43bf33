"""Top-k trimming of a whole cohort: one exact cut per client, over the flattened update or per tensor."""

import itertools
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from fedproxy.protocol import Tensors
from fedproxy.strategies.aggregators.cohort import Cohort, Source
from fedproxy.strategies.functional.scratch import Scratch
from fedproxy.strategies.functional.trimming import Threshold, Trimmer, find_threshold, top_count

SCOPES = ("global", "tensor")
_WORKERS = 4  # each needs 4 bytes per coordinate of a client


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
        return dict.fromkeys(cohort.names, Trimmer(_global_cuts(cohort, densities)))
    trimmers = {}
    for name in cohort.names:
        sources = cohort.read(name)
        count = math.prod(sources[0].shape)
        trimmers[name] = Trimmer(
            find_threshold(source.parts, count, top_count(density, count))
            for source, density in zip(sources, densities, strict=True)
        )
    return trimmers


def _global_cuts(cohort: Cohort, densities: Sequence[float]) -> list[Threshold]:
    """Find the cuts of whole updates, a few clients at a time side by side."""
    size, workers = cohort.size, min(_WORKERS, torch.get_num_threads(), len(cohort))
    cuts: dict[int, Threshold] = {}

    def work(first: int) -> None:
        scratch = Scratch()
        for client in range(first, len(cohort), workers):
            delta = cohort.updates[client].delta

            def stream(delta: Tensors = delta) -> Iterator[Tensor]:
                return itertools.chain.from_iterable(Source.of(delta, name).parts() for name in cohort.names)

            cuts[client] = find_threshold(stream, size, top_count(densities[client], size), scratch=scratch)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, range(workers)))
    return [cuts[client] for client in range(len(cohort))]
