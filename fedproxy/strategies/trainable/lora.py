"""LoRA through PEFT: low-rank adapters on chosen linear layers of chosen blocks."""

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from peft import LoraModel as PeftLora
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedproxy.errors import ConfigError
from fedproxy.models import Decoder
from fedproxy.modules.distillation_config import MOST_RANK
from fedproxy.strategies.functional.lowrank import A_SUFFIX, B_SUFFIX
from fedproxy.strategies.trainable.base import TrainableModel
from fedproxy.strategies.trainable.blocks import BlockwiseTrainable
from fedproxy.strategies.trainable.fused_lora import fuse
from fedproxy.strategies.trainable.lora_places import choose, inject, saved_config

_MOST_ALPHA = 1e6
"""Largest scale of an adapter: far above any that trains, far below what overflows in a product."""
_ADAPTER = "default"
_PREFIX = "base_model.model."
_LENGTHS = ".lora_magnitude_vector.weight"
"""End of the names of DoRA's lengths; in PEFT's files they end without ``.weight``."""


@dataclass(frozen=True)
class Lora(BlockwiseTrainable, name="lora"):
    """LoRA (Hu et al. 2022, arXiv 2106.09685): W + s B A, s = alpha / r, with A random, B zero at the start.

    A is drawn as PEFT draws it (Kaiming uniform, a = sqrt(5)) but from the given generator, so that all clients of a
    federation share one A; without that, signs and cosines of factor updates mean nothing.
    """

    r: int = 8
    """Rank, from 1 to 65536."""
    alpha: float = 16
    """Scale, from 1e-6 to 1e6: the adapter's product is multiplied by alpha / r, or with rslora by alpha / sqrt(r)."""
    dropout: float = 0.0
    """Dropout on the adapter's input, in [0, 1)."""
    modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Names of linear layers inside a block that get an adapter, or ``all-linear``: all but routers and idle ones."""
    parameters: tuple[str, ...] = ()
    """Names of routed experts' weights that get an adapter of rank r per expert (``gate_up_proj``); none by default."""
    rslora: bool = False
    """Scale by alpha / sqrt(r), so that high ranks learn as fast as low ones (Kalajdzievski 2023, arXiv 2312.03732)."""
    dora: bool = False
    """Also train the length of each row of W + s B A (DoRA, Liu et al. 2024, arXiv 2402.09353). Rules that merge
    products s B A do not take it, for they would merge a part of the change."""

    def __post_init__(self) -> None:
        """Check the options; names become tuples."""
        super().__post_init__()
        self.require("r", 1 <= self.r <= MOST_RANK, f"from 1 to {MOST_RANK}")
        self.require("alpha", 1 / _MOST_ALPHA <= self.alpha <= _MOST_ALPHA, f"from 1e-6 to {_MOST_ALPHA:g}")
        self.require("dropout", 0 <= self.dropout < 1, "in [0, 1)")
        for field in ("modules", "parameters"):
            given = getattr(self, field)
            names = (given,) if isinstance(given, str) else tuple(given)
            self.require(field, all(isinstance(name, str) and name for name in names), "a list of names")
            object.__setattr__(self, field, names)
        self.require("modules", bool(self.modules or self.parameters), "at least one module name")
        self.require("dropout", not self.dropout or not self.parameters, "0 where trainable.parameters is set")
        self.require("dora", not (self.dora and self.parameters), "false where trainable.parameters is set")

    @property
    def lora_scaling(self) -> float | None:
        """Scale s of the products s B A.

        None where these are not the whole change of a matrix: with ``dora``, and with ``parameters``, where a pair
        stands for one product per expert.
        """
        if self.parameters or self.dora:
            return None
        return self.alpha / math.sqrt(self.r) if self.rslora else self.alpha / self.r

    @property
    def key(self) -> str:
        """What asks for this in a recipe."""
        if self.dora:
            return "trainable.dora=true"
        return f"trainable.parameters=[{','.join(self.parameters)}]" if self.parameters else super().key

    def check(self, target: Decoder) -> None:
        """Check that the names fit something in the target's blocks that a low-rank change can reach."""
        choose(target, self.modules, self.parameters, range(len(target)))

    def attach(self, proxy: PreTrainedModel, generator: torch.Generator | None = None) -> "LoraModel":
        """Freeze the proxy and put initialised adapters into its blocks, in place.

        Raises:
            ConfigError: If a name fits nothing in the blocks, or something that a low-rank change cannot reach exactly.
        """
        proxy.requires_grad_(False)
        decoder = Decoder.of(proxy)
        chosen = choose(decoder, self.modules, self.parameters, self.block_indices(len(decoder)))
        layers = {name: decoder.blocks.get_submodule(name) for name in chosen.layers}
        options = {
            "task_type": "CAUSAL_LM",
            "r": self.r,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "fan_in_fan_out": any(isinstance(layer, Conv1D) for layer in layers.values()),
            "bias": "none",
            "use_rslora": self.rslora,
            "use_dora": self.dora,
        }
        files = saved_config(decoder, chosen, options)
        if self.dora and files.target_parameters:
            raise ConfigError(
                f"trainable.dora: PEFT keeps {min(files.target_parameters)} as a parameter, of which it has no DoRA; "
                "set it to false"
            )
        tuner = inject(decoder, chosen, options, _ADAPTER)
        proxy.train(proxy.training)  # new dropout is as the rest
        model = LoraModel(proxy, tuner, f"{_PREFIX}{decoder.prefix}.", files)
        model.initialise(generator or torch.Generator().manual_seed(0))
        if self.dora:
            return model  # its forward is PEFT's own
        fuse([[decoder.blocks.get_submodule(name) for name in group] for group in chosen.groups], _ADAPTER)
        return model


class LoraModel(TrainableModel):
    """A proxy with LoRA adapters inside; state names are those of PEFT's adapter files.

    Args:
        model: The proxy, with the adapters inside.
        tuner: What put them there.
        prefix: What stands before a parameter's name in PEFT's files.
        files: The adapter's configuration, as it is saved.
    """

    def __init__(self, model: PreTrainedModel, tuner: PeftLora, prefix: str, files: LoraConfig) -> None:
        named = {
            prefix + name.replace(f".{_ADAPTER}.", "."): parameter
            for name, parameter in tuner.model.named_parameters()
            if parameter.requires_grad
        }
        super().__init__(model, named)
        self._tuner, self._files = tuner, files
        self._exact: dict[str, Tensor] = {}
        self._moved: dict[str, list[Tensor]] = {}

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Draw every A from the generator, in sorted order of names, zero every B, and take W's lengths for DoRA's.

        Raises:
            ConfigError: If DoRA meets a weight with a row of zeros.
        """
        for name, parameter in self._parameters.items():
            if ".lora_A." in name:
                # Drawn on the CPU in float32, so that every device and precision starts from the same values.
                drawn = torch.empty(parameter.shape)
                nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
                parameter.copy_(drawn)
            elif ".lora_B." in name:
                parameter.zero_()
        for name, layer in self.layers().items():
            if _ADAPTER not in layer.lora_magnitude_vector:
                continue
            lengths = _lengths(_rows(layer, layer.get_base_layer().weight))
            if not lengths.is_meta and not bool(lengths.all()):
                raise ConfigError(
                    f"trainable.dora: {name} has a row of zeros, which has no direction to keep; leave it out of "
                    "trainable.modules, or set trainable.dora=false"
                )
            layer.lora_magnitude_vector[_ADAPTER].weight.copy_(lengths)

    def layers(self) -> dict[str, LoraLayer]:
        """Return the adapted linear layers by their name in the plain proxy."""
        return {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper)
        }

    def experts(self) -> dict[str, ParamWrapper]:
        """Return the adapted weights of experts by their name in the plain proxy."""
        return {
            f"{name.replace('.base_layer', '')}.{module.parameter_name}": module
            for name, module in self.model.named_modules()
            if isinstance(module, ParamWrapper)
        }

    @torch.no_grad()
    def add_to_frozen(self, change: Mapping[str, Tensor]) -> None:
        """Add s B A to W, in float32; W of a lower precision is rounded once, from the sum over all calls."""
        layers = self.layers()
        for name, factor in change.items():
            self._moved.setdefault(name, []).append(factor.float().cpu())
        for name in sorted(name for name in change if name.endswith(B_SUFFIX)):
            module = name.removeprefix(_PREFIX).removesuffix(B_SUFFIX)
            if module not in layers:
                super().add_to_frozen({name: change[name]})
            layer = layers[module]
            weight: Tensor = layer.get_base_layer().weight
            product = change[name].float() @ change[name.removesuffix(B_SUFFIX) + A_SUFFIX].float()
            product = product.T if layer.fan_in_fan_out else product
            exact = weight if weight.dtype == torch.float32 else self._exact.setdefault(module, weight.float().cpu())
            exact.add_(product.to(exact.device), alpha=layer.scaling[_ADAPTER])
            if exact is not weight:
                weight.copy_(exact)

    def merged_weights(self) -> Mapping[str, Tensor]:
        """Return the weight of every adapted layer by its name in the plain proxy, in float32.

        It is W + s B A; with DoRA, each of its rows (an output's weights) is brought to the length that was learned.
        """
        layers = {f"{name}.weight": layer for name, layer in self.layers().items()} | self.experts()
        return _MergedWeights({name: layers[name] for name in sorted(layers)}, self._exact)

    def save_adapter(self, folder: str | Path, *, base: str | None = None) -> None:
        """Write ``adapter_config.json`` and ``adapter_model.safetensors``; loads with ``PeftModel.from_pretrained``.

        What was moved into the frozen weights is stacked behind the factors, as an adapter of higher rank and equal
        scale, so that the plain proxy with this adapter is the tuned one.

        PEFT's own writer would put the path that the proxy was loaded from into both the configuration and a model
        card, and the proxy's origin is the server's secret.
        """
        config = copy.copy(self._files)
        config.base_model_name_or_path, config.inference_mode = base, True
        state = self.state()
        for name, factors in self._moved.items():
            stacked = [state[name], *(factor.to(state[name].dtype) for factor in factors)]
            state[name] = torch.cat(stacked, dim=1 if name.endswith(B_SUFFIX) else 0)
            if name.endswith(A_SUFFIX):  # all have one rank: every client sends every pair
                rank = len(state[name])
                more = math.sqrt(rank / config.r) * config.r if config.use_rslora else rank
                config.lora_alpha, config.r = config.lora_alpha / config.r * more, rank
        state = {name.replace(_LENGTHS, _LENGTHS.removesuffix(".weight")): tensor for name, tensor in state.items()}
        config.save_pretrained(str(folder))
        save_file(state, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Let the model run as the plain proxy for the length of the context."""
        self._tuner.disable_adapter_layers()
        try:
            yield
        finally:
            self._tuner.enable_adapter_layers()

    def detach(self) -> PreTrainedModel:
        """Take the adapters off and return the plain, unchanged proxy."""
        self._tuner.unload()
        return self.model


class _MergedWeights(Mapping[str, Tensor]):
    """Merged weights by name, one computed at a time."""

    def __init__(self, layers: Mapping[str, LoraLayer], exact: Mapping[str, Tensor]) -> None:
        self._layers, self._exact = layers, exact

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    @torch.no_grad()
    def __getitem__(self, name: str) -> Tensor:
        layer = self._layers[name]
        if isinstance(layer, ParamWrapper):
            return _with_experts(layer)
        weight: Tensor = layer.get_base_layer().weight
        weight = self._exact.get(name.removesuffix(".weight"), weight).to(weight.device)
        a, b = layer.lora_A[_ADAPTER].weight.float(), layer.lora_B[_ADAPTER].weight.float()
        change = b @ a
        change, weight = change.T if layer.fan_in_fan_out else change, weight.float()
        # An untrained adapter leaves every bit: -0.0 + 0.0 would be 0.0.
        merged = torch.where(change == 0, weight, weight.add(change, alpha=layer.scaling[_ADAPTER]))
        if _ADAPTER not in layer.lora_magnitude_vector:
            return merged
        factor = layer.lora_magnitude_vector[_ADAPTER].weight.float() / _lengths(_rows(layer, merged))
        scaled: Tensor = merged * (factor if layer.fan_in_fan_out else factor[:, None])
        return scaled


def _rows(layer: LoraLayer, weight: Tensor) -> Tensor:
    """Return a layer's weight as (out, in), float32."""
    return (weight.T if layer.fan_in_fan_out else weight).float().contiguous()  # one layout, one order of sums


def _lengths(rows: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return lengths


def _with_experts(layer: ParamWrapper) -> Tensor:
    """Return W_e + s B_e A_e of all experts e, float32; PEFT's A is (e r, in), its B (out, r e)."""
    weight: Tensor = layer.get_param().float()
    a, b = layer.lora_A[_ADAPTER].weight.float(), layer.lora_B[_ADAPTER].weight.float()
    experts, (out, inner) = len(weight), (b.shape[0], a.shape[1])
    change = torch.einsum("ore,eri->eoi", b.reshape(out, -1, experts), a.reshape(experts, -1, inner))
    # Families keep an expert's weight as (out, in) or, which PEFT knows by the same note, as (in, out).
    change = change.mT if getattr(layer.get_base_layer(), "is_transposed", False) else change
    return torch.where(change == 0, weight, weight.add(change, alpha=layer.scaling[_ADAPTER]))
