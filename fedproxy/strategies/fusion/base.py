"""The family of fusion operators."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fedproxy.errors import ModelError, one_line
from fedproxy.models import Decoder, LayerMap, state_sha256
from fedproxy.models.decoder import set_weights, share_weights
from fedproxy.models.feed_forward import FeedForward
from fedproxy.models.mapped import release
from fedproxy.registry import Component

Weights = Mapping[str, Tensor]
Judge = Callable[[PreTrainedModel], float]
"""Gives a model's mean negative log-likelihood on public text, nats per token: lower is better."""


@dataclass(frozen=True)
class Fusion(Component, family="fusion"):
    """Builds the fused model from the target and the proxy before and after federated tuning.

    A subclass gives the new value of one moved weight in :meth:`combine`; one that does more overrides :meth:`join`.
    Of blocks that share one target block the centre's weights move (:attr:`LayerMap.centres`); of narrowed blocks the
    neurons that are left, each back to its own place.
    """

    adds_logits: ClassVar[bool] = False
    """The fused model adds logits of target and proxy, so that both must have one vocabulary."""

    @property
    def keeps_proxy(self) -> bool:
        """Whether the tuned proxy itself is in the result, and not only what its blocks learned."""
        return self.adds_logits

    @property
    def judged_texts(self) -> int:
        """How many public texts :meth:`settle` needs to judge models on; 0 where nothing is left open."""
        return 0

    def settle(
        self, target: PreTrainedModel, before: PreTrainedModel, after: Weights, layer_map: LayerMap, judge: Judge
    ) -> Self:
        """Return this operator with every option fixed that is chosen on public text; itself where none is."""
        return self

    @abstractmethod
    def combine(self, target: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """Return a target weight's new value.

        Args:
            target: The target's weight, float32; of a narrowed block, its part for the neurons that the proxy has.
            before: The proxy's weight before federated tuning, float32, same shape.
            after: The same after it, float32.
        """

    def fuse(
        self,
        target: PreTrainedModel,
        before: PreTrainedModel | Weights,
        after: PreTrainedModel | Weights,
        layer_map: LayerMap,
    ) -> PreTrainedModel:
        """Return the fused model, in evaluation mode; all inputs stay as they are.

        Weights that do not move are shared with the target.

        Args:
            target: The model that compression started from.
            before: The proxy that clients received, or its state dict.
            after: The tuned proxy with its LoRA merged, or its state dict. Weights in float32 keep their precision
                until the one cast to the target's dtype.
            layer_map: The server's map from proxy blocks to target blocks.

        Raises:
            ModelError: If the target is not the one that the map was made from, or a weight is missing or misshapen.
        """
        layer_map.require_target(state_sha256(target))
        return self.join(target, before, after, layer_map)

    def join(
        self,
        target: PreTrainedModel,
        before: PreTrainedModel | Weights,
        after: PreTrainedModel | Weights,
        layer_map: LayerMap,
    ) -> PreTrainedModel:
        """Return the fused model of inputs that :meth:`fuse` has checked."""
        moved = dict(self._moved(target, state_of(before), state_of(after), layer_map))
        fused = share_weights(target)
        set_weights(fused, moved)
        return fused

    def _moved(
        self, target: PreTrainedModel, before: Weights, after: Weights, layer_map: LayerMap
    ) -> Iterator[tuple[str, Tensor]]:
        decoder = Decoder.of(target)
        own = target.state_dict()
        for new in layer_map.centres:
            old = layer_map.proxy_to_target[new]
            places = _Places.of(decoder, old, layer_map.neurons[new] if layer_map.neurons is not None else None)
            for name in decoder.weight_names(old):
                source, goal = decoder.full_name(new, name), decoder.full_name(old, name)
                weight = own[goal]
                part = places.gather(name, weight)
                untuned, tuned = _like(part, before, source, "before"), _like(part, after, source, "after")
                value = self.combine(part.float(), untuned, tuned)
                yield goal, places.scatter(name, weight, value.to(weight.dtype))
            release()


def _like(part: Tensor, weights: Weights, name: str, which: str) -> Tensor:
    """Return a proxy's weight, float32, of the shape of ``part``; it may be computed on being read."""
    weight = weights.get(name)
    if weight is None or weight.shape != part.shape:
        raise ModelError(f"fusion: the proxy {which} tuning has no {name} of shape {tuple(part.shape)}")
    return weight.float()


def check_tuned(after: Weights, before: Weights) -> None:
    """Refuse weights that are not those of a tuned proxy: of other names or shapes, or not finite.

    Args:
        after: What is called the tuned proxy's state dict; what it lacks is left to whoever needs it.
        before: The proxy's own.

    Raises:
        ModelError: Naming the first such weight.
    """
    for name, weight in after.items():
        known = before.get(name)
        if known is None:
            raise ModelError(f"fusion: the proxy has no {one_line(name, 120)}, which tuned holds; give the tuned proxy")
        if not isinstance(weight, Tensor) or weight.shape != known.shape:
            raise ModelError(f"fusion: the proxy after tuning has no {name} of shape {tuple(known.shape)}")
        if not weight.isfinite().all():
            raise ModelError(f"fusion: {name} of the proxy after tuning is not finite; tune it with a lower rate")


@dataclass(frozen=True)
class _Places:
    """Which part of a target block's weights the proxy has: all of it, or some feed-forward neurons."""

    layer: FeedForward | None
    neurons: Sequence[int] = ()

    @classmethod
    def of(cls, decoder: Decoder, block: int, neurons: Sequence[int] | None) -> "_Places":
        if neurons is None:
            return cls(None)
        hidden = decoder.model.config.get_text_config().hidden_size
        return cls(FeedForward.of(decoder.blocks[block], hidden), neurons)

    def gather(self, name: str, weight: Tensor) -> Tensor:
        return weight if self.layer is None else self.layer.gather(name, weight, self.neurons)

    def scatter(self, name: str, weight: Tensor, part: Tensor) -> Tensor:
        return part if self.layer is None else self.layer.scatter(name, weight, self.neurons, part)


def changed_by(weight: Tensor, change: Tensor) -> Tensor:
    """Return weight + change, to the bit the weight where nothing changed (-0.0 + 0.0 would be 0.0)."""
    return torch.where(change == 0, weight, weight + change)


def has_moved(before: Tensor, after: Tensor) -> bool:
    """Return whether two weights are more than two views of one tensor."""
    return before.data_ptr() != after.data_ptr()


def state_of(model: PreTrainedModel | Weights) -> Weights:
    """Return a model's state dict, or the state dict itself."""
    return model.state_dict() if isinstance(model, PreTrainedModel) else model
