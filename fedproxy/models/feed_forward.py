"""The feed-forward part of a block, found by the shapes of its layers: where each of its neurons lies."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedproxy.errors import ModelError

WIDTH_KEYS = ("intermediate_size", "ffn_dim", "n_inner")
"""Configuration fields in which families keep the number of feed-forward neurons."""


@dataclass(frozen=True)
class FeedForward:
    """Layout of one block's feed-forward neurons.

    A neuron is a row of the projections into the inner layer (gate and up), an entry of their biases, and a column of
    the projection out of it (down).
    """

    width: int
    """Number of neurons."""
    axes: Mapping[str, tuple[int, int]]
    """Weight's name inside the block -> (dimension of the neurons, how often each lies there: 2 for a fused gate and
    up)."""

    @classmethod
    def of(cls, block: nn.Module, hidden: int) -> "FeedForward":
        """Find the layout from shapes: linear layers outside attention, all into or out of one inner width.

        Args:
            block: A block of the decoder.
            hidden: Width of the residual stream.

        Raises:
            ModelError: If the block has no single feed-forward layer (mixtures of experts, for example).
        """
        layers = {name: module for name, module in block.named_modules() if _linear(module) and not _attends(name)}
        sizes = {name: _in_out(module) for name, module in layers.items()}
        for down in reversed(list(layers)):  # registered last wherever sizes alone do not tell
            width, out = sizes[down]
            into = {name: size[1] for name, size in sizes.items() if name != down}
            fits = all(sizes[name][0] == hidden and out_i in (width, 2 * width) for name, out_i in into.items())
            if out == hidden and into and fits:
                axes = {f"{down}.weight": (_in_dimension(layers[down]), 1)}
                for name, out_i in into.items():
                    axes[f"{name}.weight"] = (1 - _in_dimension(layers[name]), out_i // width)
                    if layers[name].bias is not None:
                        axes[f"{name}.bias"] = (0, out_i // width)
                found = cls(width, axes)
                if found.complete(block, hidden):
                    return found
        raise ModelError(
            f"compression.name=ffn_width: {type(block).__name__} has no single feed-forward layer to narrow; "
            "choose a compressor that removes blocks"
        )

    @property
    def out_projection(self) -> str:
        """Name, inside the block, of the layer out of the inner width."""
        return next(iter(self.axes)).removesuffix(".weight")

    def complete(self, block: nn.Module, hidden: int) -> bool:
        """Say whether no other weight outside attention may have a place per neuron."""
        others = {
            name: parameter
            for name, parameter in block.named_parameters()
            if name not in self.axes and not _attends(name.rpartition(".")[0])
        }
        return all(tuple(parameter.shape) == (hidden,) for parameter in others.values())

    def places(self, name: str, neurons: Sequence[int]) -> Tensor:
        """Return the indices, int64, of neurons along their dimension of the weight called ``name``."""
        index = torch.tensor(neurons, dtype=torch.long)
        return torch.cat([index + part * self.width for part in range(self.axes[name][1])])

    def gather(self, name: str, weight: Tensor, neurons: Sequence[int]) -> Tensor:
        """Return the weight with these neurons alone, in their order; weights without neurons come back as they are."""
        if name not in self.axes:
            return weight
        return weight.index_select(self.axes[name][0], self.places(name, neurons).to(weight.device))

    def scatter(self, name: str, weight: Tensor, neurons: Sequence[int], part: Tensor) -> Tensor:
        """Return a copy of ``weight`` with ``part``, as :meth:`gather` gives it, in these neurons' places."""
        if name not in self.axes:
            return part
        return weight.index_copy(self.axes[name][0], self.places(name, neurons).to(weight.device), part)


def _linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _attends(name: str) -> bool:
    """Say whether a module lies inside attention, going by its path (self_attn, attention, attn)."""
    return any("att" in part for part in name.split("."))


def _in_dimension(module: nn.Module) -> int:
    """Return the dimension of a layer's weight that its input runs along."""
    return 0 if isinstance(module, Conv1D) else 1


def _in_out(module: nn.Module) -> tuple[int, int]:
    shape: tuple[int, ...] = tuple(module.weight.shape)  # type: ignore[arg-type]
    axis = _in_dimension(module)
    return shape[axis], shape[1 - axis]
