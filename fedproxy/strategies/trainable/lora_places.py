"""Where LoRA goes: names become layers inside the blocks that fusion moves, and PEFT puts adapters there alone."""

import copy
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig
from peft import LoraModel as PeftLora
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedproxy.errors import ConfigError, first_line, nearest
from fedproxy.models import Decoder
from fedproxy.strategies.trainable.reach import (
    expert_weights,
    is_router,
    linear_layers,
    observe,
    read_past,
    shared_layers,
)

ALL_LINEAR = "all-linear"
"""Name for all linear layers of the blocks but routers and what no change reaches."""


@dataclass(frozen=True)
class Places:
    """What gets adapters, by name in the blocks (``0.self_attn.q_proj``)."""

    layers: list[str]
    """Linear layers, in the model's order."""
    weights: list[str]
    """Weights of routed experts."""
    blocks: list[int] | None
    """The blocks that they lie in, where these are not all."""
    groups: list[list[str]] = field(default_factory=list)
    """The layers that read one tensor, in call order; empty on the meta device, where nothing is computed."""


def choose(decoder: Decoder, modules: Sequence[str], parameters: Sequence[str], blocks: Sequence[int]) -> Places:
    """Find what the names of a recipe stand for, and that a low-rank change of it is exact.

    Args:
        decoder: The proxy, frozen.
        modules: Names of linear layers, or :data:`ALL_LINEAR`.
        parameters: Names of experts' weights.
        blocks: Which blocks get adapters.

    Raises:
        ConfigError: If a name fits nothing in the blocks, or something that a change would not reach exactly.
    """
    past, linear, experts = read_past(decoder), linear_layers(decoder), expert_weights(decoder)
    every = list(modules) == [ALL_LINEAR]
    if every:
        named = {n for n in linear if not is_router(n, decoder) and f"{n}.weight" not in past}
    else:
        named = _named(decoder, modules, linear, experts)
    weights = _weights(parameters, experts)
    _refuse_past(past, [f"{name}.weight" for name in named], "modules")
    _refuse_past(past, weights, "parameters")
    within = set(map(str, blocks))
    layers = [name for name in linear if name in named and name.partition(".")[0] in within]
    weights = [name for name in weights if name.partition(".")[0] in within]
    groups: list[list[str]] = []
    if decoder.model.device.type != "meta":
        layers, groups = _reached(decoder, {name: linear[name] for name in layers}, every=every)
    if shared := shared_layers(decoder).intersection(layers):
        raise ConfigError(f"trainable.modules: {_leaf(min(shared))!r} is one layer in several places; leave it out")
    if not layers and not weights:
        raise ConfigError(f"trainable.blocks: blocks {list(blocks)} have none of {list(modules)}; choose others")
    return Places(layers, weights, None if len(blocks) == len(decoder) else list(blocks), groups)


def inject(decoder: Decoder, places: Places, options: Mapping[str, Any], adapter: str) -> PeftLora:
    """Put adapters into the blocks with PEFT, in place.

    Args:
        decoder: The proxy.
        places: Where.
        options: Of PEFT's LoraConfig.
        adapter: PEFT's name of the adapter.

    Raises:
        ConfigError: If PEFT cannot adapt one of the places.
    """
    config = LoraConfig(**options, target_modules=places.layers, target_parameters=places.weights or None)
    blocks = decoder.blocks
    for bits in ("is_loaded_in_8bit", "is_loaded_in_4bit"):  # where PEFT looks for quantised layers
        setattr(blocks, bits, getattr(decoder.model, bits, False))
    # The blocks alone: given the whole model, PEFT would take names of a mixture's dense layers for its experts'.
    # It initialises from the global generator first; keep that from showing.
    try:
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tuner = PeftLora(blocks, config, adapter)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ConfigError(
            f"trainable: PEFT cannot adapt the proxy ({first_line(error)}); choose other modules"
        ) from error
    for parameter in tuner.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()  # trained and sent in float32, whatever the frozen weights are in
    return tuner


def saved_config(decoder: Decoder, places: Places, options: Mapping[str, Any]) -> LoraConfig:
    """Return the configuration with which PEFT puts adapters into a plain proxy in the same places.

    Names are short where they fit nothing else in the model. A name that PEFT takes for that of experts, which older
    checkpoints had under it, goes in as the parameter that it is.

    Args:
        decoder: The plain proxy.
        places: Where the adapters go.
        options: Of PEFT's LoraConfig.
    """
    full = {f"{decoder.prefix}.{name}" for name in places.layers}
    config = LoraConfig(**options, target_modules=sorted({_leaf(name) for name in full}))
    config.layers_to_transform = places.blocks
    fits = {name for name, _ in decoder.model.named_modules() if check_target_module_exists(config, name)}
    if fits != full:
        config.target_modules, config.layers_to_transform = sorted(full), None
    taken = sorted(name for name in full if _taken_for_experts(config, name, decoder.model))
    weights = sorted([f"{decoder.prefix}.{name}" for name in places.weights] + [f"{name}.weight" for name in taken])
    if weights:
        config.target_modules, config.layers_to_transform = sorted(full.difference(taken)), None
        config.target_parameters, config.lora_dropout = weights, 0.0  # of no use once trained, and PEFT would refuse it
    else:
        config.target_modules = sorted(config.target_modules)
    return config


def _taken_for_experts(config: LoraConfig, name: str, model: nn.Module) -> bool:
    """Say whether PEFT, reading a configuration for this model, would replace a layer's name by a parameter's."""
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers as convert
    except ImportError:  # PEFT before 0.19 takes names as they are
        return False
    alone = copy.copy(config)
    alone.target_modules, alone.target_parameters = {name}, None
    alone.rank_pattern, alone.alpha_pattern = {}, {}
    try:
        convert(alone, model=model, conversions=None)
    except ValueError:  # it would want the names of the parameter's other parts as well
        return True
    return set(alone.target_modules) != {name}


def _named(decoder: Decoder, modules: Sequence[str], linear: Collection[str], experts: Collection[str]) -> set[str]:
    """Return the layers in the blocks that have one of the names."""
    leaves = {_leaf(name) for name in linear}
    for name in modules:
        if name not in leaves:
            raise ConfigError(f"trainable.modules: {_misnamed(name, decoder, leaves, experts)}")
    return {name for name in linear if _leaf(name) in modules}


def _misnamed(name: str, decoder: Decoder, leaves: Collection[str], experts: Collection[str]) -> str:
    """Return why a name fits no linear layer in the blocks, and the way out."""
    known = ", ".join(sorted(leaf for leaf in leaves if not leaf.isdigit()))
    if name == ALL_LINEAR:
        return f"{name!r} stands for all layers; give it alone"
    if "." in name:
        return f"{name!r} must be a layer's name inside its block, one of {known}; trainable.blocks chooses blocks"
    outside = {_leaf(n) for n, m in decoder.model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    if name in outside:
        return f"{name!r} lies outside of the blocks, and fusion moves blocks alone; known: {known}"
    close = nearest(name, leaves)
    hint = f"{close} known: {known}" if close.endswith("?") else close
    if experts:
        weights = ", ".join(sorted({_leaf(weight) for weight in experts}))
        hint = f"; known: {known}; experts' weights ({weights}) are named in trainable.parameters"
    return f"the proxy's blocks have no linear layer {name!r}{hint}"


def _weights(parameters: Sequence[str], experts: Collection[str]) -> list[str]:
    for name in parameters:
        if not any(weight.endswith(f".{name}") for weight in experts):
            known = {_leaf(weight) for weight in experts}
            hint = nearest(name, known) if known else "; it has no routed experts, leave trainable.parameters empty"
            raise ConfigError(f"trainable.parameters: the proxy's blocks have no weight of experts {name!r}{hint}")
    return [weight for weight in experts if any(weight.endswith(f".{name}") for name in parameters)]


def _refuse_past(past: Collection[str], weights: Collection[str], key: str) -> None:
    found = sorted(set(weights) & set(past))
    if found:
        name = found[0].removesuffix(".weight")
        raise ConfigError(
            f"trainable.{key}: the model computes with the weight of {_leaf(name)!r} itself (block {found[0]}), past "
            "any adapter; leave it out"
        )


def _reached(decoder: Decoder, layers: Mapping[str, nn.Module], *, every: bool) -> tuple[list[str], list[list[str]]]:
    """Return the layers that a forward pass calls, and their groups, of which each name must have one that matters."""
    seen = observe(decoder, layers)
    useless = seen.idle | (seen.mute if every else set())
    names = {_leaf(name) for name in layers}
    live = {_leaf(name) for name in layers if name not in seen.idle and name not in seen.mute}
    if names - live and not every:
        raise ConfigError(
            f"trainable.modules: nothing would train {min(names - live)!r}: what it gives has no part in what the "
            "model says, or it reads zeros alone; leave it out"
        )
    kept = [name for name in layers if name not in useless]
    groups = [[name for name in group if name in kept] for group in seen.groups]
    alone = [[name] for name in kept if not any(name in group for group in groups)]
    return kept, [group for group in [*groups, *alone] if group]


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
