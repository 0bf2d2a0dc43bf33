"""The clients' change, carried on to the blocks that compression removed."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from fedproxy.models import Decoder, LayerMap
from fedproxy.strategies.fusion.base import Fusion, Weights, changed_by


@dataclass(frozen=True)
class Interpolate(Fusion, name="interpolate"):
    """Plug-in by delta, and a removed block takes part of the average of its kept neighbours' changes.

    With D_j the change of proxy block j and pi(j) its place, a removed block i between the kept places
    a = pi(j) < i < b = pi(j + 1) gets W_i += strength ((b - i) D_j + (i - a) D_{j+1}) / (b - a); below the first or
    above the last kept place it gets strength times the change of that one. Kept blocks get D_j as plug-in gives it.

    Choice: not from a paper. Blocks are averaged in what tuning *changed*; averaging the weights of different blocks
    themselves would spoil the target even where nothing was tuned.
    """

    strength: float = 0.5
    """Share of the neighbours' change that a removed block takes, in [0, 1]; 0 is plug-in by delta."""

    def __post_init__(self) -> None:
        """Check the options."""
        self.require("strength", 0.0 <= self.strength <= 1.0, "in [0, 1]")

    def combine(self, target: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """Return a kept block's weight: the target's plus the change."""
        return changed_by(target, after - before)

    def _moved(
        self, target: PreTrainedModel, before: Weights, after: Weights, layer_map: LayerMap
    ) -> Iterator[tuple[str, Tensor]]:
        yield from super()._moved(target, before, after, layer_map)
        if not self.strength:
            return
        decoder, own = Decoder.of(target), target.state_dict()
        blocks = {layer_map.proxy_to_target[block]: block for block in layer_map.centres}
        for index in sorted(set(range(len(decoder))) - set(blocks)):
            shares = neighbours(blocks, index)
            for name in decoder.weight_names(index):
                goal = decoder.full_name(index, name)
                value = own[goal].float()
                for block, share in shares:
                    source = decoder.full_name(block, name)
                    # Blocks of one model may differ in what they hold; what a neighbour lacks stays as it is.
                    if source in after and after[source].shape == value.shape:
                        change = after[source].float() - before[source].float()
                        value = changed_by(value, self.strength * share * change)
                yield goal, value.to(own[goal].dtype)


def neighbours(blocks: Mapping[int, int], index: int) -> list[tuple[int, float]]:
    """Return the proxy blocks next to a removed place, with their shares, which add up to 1.

    Args:
        blocks: Kept place in the target to block of the proxy.
        index: A place of the target that is not kept.
    """
    below = max((place for place in blocks if place < index), default=None)
    above = min((place for place in blocks if place > index), default=None)
    if below is None or above is None:
        return [(blocks[place], 1.0) for place in (below, above) if place is not None]
    width = above - below
    return [(blocks[below], (above - index) / width), (blocks[above], (index - below) / width)]
