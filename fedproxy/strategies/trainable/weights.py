"""The proxy's own weights are trained: whole blocks, as Offsite-Tuning's paper does, or biases alone."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedproxy.errors import ConfigError
from fedproxy.models import Decoder
from fedproxy.strategies.trainable.base import TrainableModel
from fedproxy.strategies.trainable.blocks import BlockwiseTrainable

WEIGHTS_FILE = "trained_weights.safetensors"


class WeightsModel(TrainableModel):
    """A proxy of which some weights are trained in place; the state has them under their own names.

    Args:
        model: The proxy.
        parameters: What is trained of it, by state name.
    """

    def __init__(self, model: PreTrainedModel, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(model, parameters)
        self._start = {} if model.device.type == "meta" else self.state()  # shapes alone have no start

    def merged_weights(self) -> Mapping[str, Tensor]:
        """Return copies of the trained weights by name, float32."""
        return {name: weight.detach().to(torch.float32, copy=True) for name, weight in self._parameters.items()}

    def save_adapter(self, folder: str | Path, *, base: str | None = None) -> None:
        """Write ``trained_weights.safetensors``, to be loaded into the proxy with ``load_state_dict(strict=False)``.

        PEFT has no format for weights that are no adapter; ``base`` is not noted.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file(self.state(), Path(folder) / WEIGHTS_FILE, metadata={"format": "pt"})

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Put the untrained weights in place for the length of the context."""
        trained = self.state()
        self.load_state(self._start)
        try:
            yield
        finally:
            self.load_state(trained)

    def detach(self) -> PreTrainedModel:
        """Put the untrained weights back and return the proxy."""
        self.load_state(self._start)
        self.model.requires_grad_(False)
        return self.model


@dataclass(frozen=True)
class FullBlocks(BlockwiseTrainable, name="full"):
    """All weights of the chosen blocks are trained; embedding, final norm and head stay, for fusion moves blocks only.

    A client sends as many values as the blocks have. The proxy must be in float32: in half precision a step of usual
    size is lost in rounding.
    """

    needs_float32: ClassVar[bool] = True

    def attach(self, proxy: PreTrainedModel, generator: torch.Generator | None = None) -> WeightsModel:
        """Freeze all but the chosen blocks."""
        return _train(proxy, _block_parameters(proxy, self.block_indices(len(Decoder.of(proxy)))), self.name)


@dataclass(frozen=True)
class Biases(BlockwiseTrainable, name="bias"):
    """Biases of the chosen blocks alone are trained (BitFit, Ben Zaken et al. 2022, arXiv 2106.10199).

    Families whose blocks have no bias (Llama, Mistral, SmolLM2) cannot be trained so.
    """

    needs_float32: ClassVar[bool] = True

    def attach(self, proxy: PreTrainedModel, generator: torch.Generator | None = None) -> WeightsModel:
        """Freeze all but the biases of the chosen blocks.

        Raises:
            ConfigError: If there is none, or the proxy is in half precision.
        """
        blocks = self.block_indices(len(Decoder.of(proxy)))
        biases = {n: p for n, p in _block_parameters(proxy, blocks).items() if n.rpartition(".")[2] == "bias"}
        if not biases:
            raise ConfigError(
                f"trainable.name=bias: the proxy's blocks have no bias ({proxy.config.model_type}); use lora or full"
            )
        return _train(proxy, biases, self.name)


def _block_parameters(proxy: PreTrainedModel, blocks: list[int]) -> dict[str, nn.Parameter]:
    decoder = Decoder.of(proxy)
    return {
        decoder.full_name(index, name): parameter
        for index in blocks
        for name, parameter in decoder.blocks[index].named_parameters()
    }


def _train(proxy: PreTrainedModel, parameters: Mapping[str, nn.Parameter], name: str) -> WeightsModel:
    half = next((parameter.dtype for parameter in parameters.values() if parameter.dtype != torch.float32), None)
    if half is not None:
        raise ConfigError(
            f"trainable.name={name} trains the proxy's own weights, and in {str(half).removeprefix('torch.')} small "
            "steps are lost; use target.dtype=float32 or trainable.name=lora"
        )
    proxy.requires_grad_(False)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    return WeightsModel(proxy, parameters)
