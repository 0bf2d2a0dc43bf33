"""The pass that merges: block by block from the clients' tensors into the sink."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedproxy.strategies.aggregators.cohort import Block, Cohort, Source
from fedproxy.strategies.aggregators.sink import Sink
from fedproxy.strategies.aggregators.survey import Surveyor, check_finite

_WIDTH = 1 << 16


class WeightedSum:
    """The merge sum_k c_k Delta_k, added up client by client in float32; clients of coefficient 0 are skipped.

    Args:
        coefficients: float64 (clients,).
    """

    def __init__(self, coefficients: Tensor) -> None:
        self._terms = [(k, c) for k, c in enumerate(coefficients.tolist()) if c != 0.0]

    def __call__(self, block: Block) -> Tensor:
        """Return the sum over one block's rows."""
        return self._add_up(lambda k: block.values[k], block.values[0])

    def from_sources(self, sources: Sequence[Source], start: int, stop: int) -> Tensor:
        """Return the sum over coordinates [start, stop) without gathering them first; the same bits as a block's."""
        return self._add_up(lambda k: sources[k].part(start, stop), sources[0].part(start, start).float(), stop - start)

    def _add_up(self, row: Callable[[int], Tensor], like: Tensor, size: int | None = None) -> Tensor:
        if not self._terms:
            return torch.zeros(like.shape if size is None else (size,))
        (first, factor), *rest = self._terms
        total: Tensor = row(first).float() * factor
        for k, coefficient in rest:
            total.add_(row(k).float(), alpha=coefficient)
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

    Raises:
        ClientError: If an update holds NaN or infinity; names client and tensor.
    """
    sources = cohort.read(name)
    sink.open(name, sources[0].shape, sources[0].dtype)
    if watch is None and isinstance(merge, WeightedSum):
        _sum_tensor(cohort, name, merge, sources, sink)
        return
    if watch is not None:
        watch.open(name, sources[0].shape)
    for block in cohort.blocks(name, sources, whole=whole):
        if watch is not None:
            watch.see(block)
        elif not surveyed and not math.isfinite(float(block.values.sum())):
            _check_block(cohort, block)
        merged = merge(block).reshape(-1)
        sink.nonzero += int(merged.sign().abs_().sum())
        sink.write(name, block.start, merged)
    if watch is not None:
        watch.close(name)


def _sum_tensor(cohort: Cohort, name: str, merge: WeightedSum, sources: Sequence[Source], sink: Sink) -> None:
    size = math.prod(sources[0].shape)
    for start in range(0, size, _WIDTH):
        stop = min(size, start + _WIDTH)
        merged = merge.from_sources(sources, start, stop)
        if not math.isfinite(float(merged.sum())):
            values = torch.stack([source.part(start, stop).float() for source in sources])
            _check_block(cohort, Block(name, start, values))
        sink.nonzero += int(merged.sign().abs_().sum())
        sink.write(name, start, merged)


def _check_block(cohort: Cohort, block: Block) -> None:
    wide = block.values.double().reshape(len(cohort), -1)
    check_finite(cohort, block.name, wide @ wide.T)
