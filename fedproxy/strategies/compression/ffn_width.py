"""Narrower feed-forward layers, every block kept (FedPFT, Peng et al. 2024, arXiv 2404.11536)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fedproxy.errors import ConfigError, ModelError
from fedproxy.models import Decoder, LayerMap, state_sha256
from fedproxy.models.decoder import copied, parameter_count
from fedproxy.models.feed_forward import WIDTH_KEYS, FeedForward
from fedproxy.models.probing import check_decoder
from fedproxy.strategies.compression.base import Batch, Compressor, require_removal
from fedproxy.strategies.compression.states import watch_blocks


@dataclass(frozen=True)
class FfnWidth(Compressor, name="ffn_width"):
    """Removes the feed-forward neurons of lowest saliency, equally many from each block; every block stays.

    ``weights``: the L2 norm of all weights connected to the neuron, FedPFT's. ``activations``: the root mean square,
    over calibration tokens, of the neuron's part in the layer's output, sqrt(E[a^2]) * ||w_out|| (ours). Of equal
    saliencies the lower index goes first. The layer map notes which neurons stayed, and fusion puts them back in place.
    """

    ratio: float = 0.5
    """Share removed, in [0, 1): nothing, or at least one neuron; of n neurons: keep = max(1, n - floor(n * ratio))."""
    ratio_of: Literal["neurons", "parameters"] = "neurons"
    """What ``ratio`` counts: a block's neurons, or the target's parameters (as many whole neurons as they hold)."""
    saliency: Literal["weights", "activations"] = "weights"
    """What a neuron is ranked by."""

    def __post_init__(self) -> None:
        """Check the options."""
        self.require("ratio", 0.0 <= self.ratio < 1.0, "in [0, 1)")
        self.require("ratio_of", self.ratio_of in ("neurons", "parameters"), "neurons or parameters")
        self.require("saliency", self.saliency in ("weights", "activations"), "weights or activations")

    @property
    def leaves_gaps(self) -> bool:
        """Return that every block stays."""
        return False

    def outline(self, decoder: Decoder) -> Any:
        """Return the target's configuration with narrower feed-forward layers."""
        return self._narrowed(decoder, self.kept_count(decoder, feed_forwards(decoder)))

    def kept_count(self, decoder: Decoder, layers: Sequence[FeedForward]) -> int:
        """Return how many neurons stay in each block.

        Raises:
            ConfigError: If all would go, or none.
        """
        width = layers[0].width
        if self.ratio_of == "neurons":
            count = max(1, width - int(width * self.ratio + 1e-9))
            require_removal(width - count, self.ratio, 1 / width, "neuron")
            return count
        blocks = zip(decoder.blocks, layers, strict=True)
        held = sum(block.get_parameter(name).numel() for block, layer in blocks for name in layer.axes)
        total = parameter_count(decoder.model)
        removed = int(self.ratio * total * width / held + 1e-9)
        if removed >= width:
            raise ConfigError(
                f"compression.ratio={self.ratio} of the parameters would remove all {width} neurons of each block, "
                f"which hold {held / total:.3f} of them; give less"
            )
        require_removal(removed, self.ratio, held / width / total, "neuron")
        return width - removed

    def score(self, decoder: Decoder, calibration: Iterable[Batch]) -> Tensor | None:
        """Return every neuron's saliency, float64 (blocks, neurons)."""
        layers = feed_forwards(decoder)
        if self.kept_count(decoder, layers) == layers[0].width:
            return None
        return weight_saliency(decoder, layers) if self.saliency == "weights" else output_saliency(decoder, calibration)

    def select(self, decoder: Decoder, scores: Tensor | None) -> Sequence[int]:
        """Return every block."""
        return range(len(decoder))

    def build(self, target: PreTrainedModel, scores: Tensor | None) -> tuple[PreTrainedModel, LayerMap]:
        """Return the narrowed proxy and the layer map with its neurons."""
        decoder = Decoder.of(target)
        layers = feed_forwards(decoder)
        if scores is None:
            return super().build(target, scores)
        count = self.kept_count(decoder, layers)
        order = scores.sort(dim=1, stable=True).indices[:, layers[0].width - count :]
        neurons = tuple(tuple(row) for row in order.sort(dim=1).values.tolist())
        source, narrow = target.state_dict(), {}
        for index, layer in enumerate(layers):
            for name in layer.axes:
                full = decoder.full_name(index, name)
                narrow[full] = layer.gather(name, source.pop(full), neurons[index])
        proxy = decoder.rebuilt(self._narrowed(decoder, count), {**copied(source), **narrow})
        check_decoder(proxy, remedy="choose a compressor that removes blocks")
        return proxy, LayerMap(tuple(range(len(decoder))), state_sha256(target), neurons)

    def _narrowed(self, decoder: Decoder, count: int) -> Any:
        config = decoder.subset_config(range(len(decoder)))
        text = config.get_text_config()
        width = feed_forwards(decoder)[0].width
        keys = [key for key in WIDTH_KEYS if getattr(text, key, 0) in (width, None)]  # GPT-2's null is 4 x hidden
        if not keys:
            raise ModelError(
                f"compression.name=ffn_width: {type(decoder.model).__name__} has no configured feed-forward width; "
                "choose a compressor that removes blocks"
            )
        for key in keys:
            setattr(text, key, count)
        return config


def feed_forwards(decoder: Decoder) -> list[FeedForward]:
    """Return the layout of every block's feed-forward neurons.

    Raises:
        ModelError: If a block has no single feed-forward layer, or blocks differ in width.
    """
    hidden = decoder.model.config.get_text_config().hidden_size
    layers = [FeedForward.of(block, hidden) for block in decoder.blocks]
    widths = sorted({layer.width for layer in layers})
    if len(widths) > 1:
        raise ModelError(
            f"compression.name=ffn_width: blocks have {widths[0]} to {widths[-1]} neurons, and a proxy has one width; "
            "choose a compressor that removes blocks"
        )
    return layers


@torch.no_grad()
def weight_saliency(decoder: Decoder, layers: Sequence[FeedForward]) -> Tensor:
    """Return the L2 norm of all weights connected to each neuron, biases included, float64 (blocks, neurons)."""
    rows = []
    for block, layer in zip(decoder.blocks, layers, strict=True):
        squares = torch.zeros(layer.width, dtype=torch.float64)
        for name, (axis, _) in layer.axes.items():
            weight = block.get_parameter(name).double().movedim(axis, 0)
            each = weight.reshape(len(weight), -1).square().sum(dim=1)
            squares += each.reshape(-1, layer.width).sum(dim=0).cpu()
        rows.append(squares.sqrt())
    return torch.stack(rows)


@torch.no_grad()
def output_saliency(decoder: Decoder, calibration: Iterable[Batch]) -> Tensor:
    """Return sqrt(E[a^2]) * ||w_out|| of each neuron over real tokens, float64 (blocks, neurons).

    a: the neuron's activation, what enters the projection out of the inner layer; w_out: its column there.

    Raises:
        DataError: If the calibration text holds no token.
        ModelError: If an activation is not finite.
    """
    layers = feed_forwards(decoder)
    squares = torch.zeros(len(layers), layers[0].width, dtype=torch.float64)
    entered: dict[int, Tensor] = {}
    outs = [layer.out_projection for layer in layers]
    handles = [
        block.get_submodule(out).register_forward_pre_hook(
            lambda _, inputs, index=index: entered.__setitem__(index, inputs[0])
        )
        for index, (block, out) in enumerate(zip(decoder.blocks, outs, strict=True))
    ]

    def add(index: int, before: Tensor, after: Tensor, mask: Tensor) -> None:
        activations = entered.pop(index).reshape(mask.numel(), -1)  # OPT hands over (batch * tokens, neurons)
        real = activations[mask.flatten().bool()].double()
        squares[index] += real.square().sum(dim=0).cpu()

    try:
        tokens = watch_blocks(decoder, calibration, add)
    finally:
        for handle in handles:
            handle.remove()
    if not bool(squares.isfinite().all()):
        raise ModelError("target: activations are not finite; load it in another target.dtype")
    blocks = zip(decoder.blocks, layers, outs, strict=True)
    norms = [
        block.get_parameter(f"{out}.weight").double().norm(dim=1 - layer.axes[f"{out}.weight"][0]).cpu()
        for block, layer, out in blocks
    ]
    return (squares / tokens).sqrt() * torch.stack(norms)
