"""The pass that merges: block by block from the clients' tensors into the sink."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fedproxy.strategies.aggregators.cohort import Block, Cohort
from fedproxy.strategies.aggregators.sink import Sink
from fedproxy.strategies.aggregators.survey import Surveyor, not_finite
from fedproxy.strategies.functional.scratch import Scratch


class WeightedSum:
    """The merge sum_k c_k Delta_k, added up client by client in float32; clients of coefficient 0 are skipped.

    Args:
        coefficients: float64 (clients,).
    """

    def __init__(self, coefficients: Tensor) -> None:
        self._terms = [(k, c) for k, c in enumerate(coefficients.tolist()) if c != 0.0]
        self._scratch = Scratch()

    def __call__(self, block: Block) -> Tensor:
        """Return the sum over one block, valid until the thread's next call."""
        total = self._scratch.take(*block.rows[0].shape)
        if not self._terms:
            return total.zero_()
        (first, factor), *rest = self._terms
        torch.mul(block.rows[first], factor, out=total)
        for k, coefficient in rest:
            total.add_(block.rows[k], alpha=coefficient)
        return total


def merge_tensor(
    cohort: Cohort,
    name: str,
    merge: Callable[[Block], Tensor],
    sink: Sink,
    *,
    whole: bool = False,
    watch: Surveyor | None = None,
    surveyed: bool = False,
    shows_faults: bool = False,
) -> None:
    """Merge one tensor into the sink, in the clients' shape and dtype.

    Args:
        cohort: The round's updates.
        name: The tensor.
        merge: Maps a block to merged float32 values.
        sink: Where they go.
        whole: Give ``merge`` the whole tensor of all clients at once.
        watch: Sees every block before it is merged.
        surveyed: The updates are known to be finite; without this or ``watch`` they are checked here.
        shows_faults: What is not finite in an update is not finite in what ``merge`` makes of it, as in every sum.

    Raises:
        ClientError: If an update holds NaN or infinity; names client and tensor.
    """
    sources = cohort.read(name)
    sink.open(name, sources[0].shape, sources[0].dtype)
    if watch is not None:
        watch.open(name, sources[0].shape)
    shows_faults = shows_faults or isinstance(merge, WeightedSum)
    for block in cohort.blocks(name, sources, whole=whole):
        if watch is not None:
            watch.see(block)
        elif not surveyed and not shows_faults:
            _check_block(cohort, block)
        merged = merge(block).reshape(-1)
        if shows_faults and not math.isfinite(float(merged.sum())):
            _check_block(cohort, block)
        sink.count(name, merged)
        sink.write(name, block.start, merged)
    if watch is not None:
        watch.close(name)


def _check_block(cohort: Cohort, block: Block) -> None:
    for client, row in zip(cohort.ids, block.rows, strict=True):
        if not math.isfinite(float(row.sum())) and not bool(row.isfinite().all()):
            raise not_finite(client, block.name)
