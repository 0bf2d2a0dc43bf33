"""What a block is built of and how it is set up: whether a block of the proxy is what the target's block is."""

import math
import re
from collections.abc import Sequence
from itertools import chain

from torch import nn

from fedproxy.errors import ModelError

_PLACE = re.compile(
    r"(^|_)(idx|index|id|number|num_hidden_layers|num_layers)$"
    r"|^(training|gradient_checkpointing|store_full_length_kv)$"
)
"""Attributes that only say where a block stands, in which mode it is, or what it leaves for others."""

Structure = dict[str, object]


def structure_of(block: nn.Module) -> Structure:
    """Return a block's modules by class, its weights and buffers by shape, and plain attributes, by their names."""
    found: Structure = {}
    for path, module in block.named_modules(remove_duplicate=False):
        found[path or "the block"] = type(module).__name__
        for name, value in vars(module).items():
            if isinstance(value, bool | int | float | str | None) and not (name.startswith("_") or _PLACE.search(name)):
                found[f"{path}.{name}".removeprefix(".")] = value
    return found | _shapes(block)


def kind_of(block: nn.Module) -> tuple[object, ...]:
    """Return what tells blocks of different kinds apart: their modules and shapes, their settings left out."""
    modules = ((path, type(module).__name__) for path, module in block.named_modules(remove_duplicate=False))
    return (*modules, *_shapes(block).items())


def _shapes(block: nn.Module) -> Structure:
    tensors = chain(block.named_parameters(remove_duplicate=False), block.named_buffers(remove_duplicate=False))
    return {name: f"of shape {tuple(tensor.shape)}" for name, tensor in tensors}


def check_structure(kind: str, own: Sequence[nn.Module], target: Sequence[nn.Module], kept: Sequence[int]) -> None:
    """Check that each block of a proxy is built and set up as the target's block that it stands for.

    Args:
        kind: The model's class, for the message.
        own: The proxy's blocks, on any device.
        target: All of the target's blocks.
        kept: The target's block behind each of the proxy's.

    Raises:
        ModelError: If one is not, as where a block's place decides what it is.
    """
    for new, (block, old) in enumerate(zip(own, kept, strict=True)):
        built, wanted = structure_of(block), structure_of(target[old])
        for name in dict.fromkeys([*wanted, *built]):
            if not _alike(built.get(name), wanted.get(name)):
                raise ModelError(
                    f"{kind}: block {old} would work differently in place {new} ({name} is {built.get(name)}, not "
                    f"{wanted.get(name)}); keep other blocks (compression.keep) or choose compression.name=none"
                )


def _alike(first: object, second: object) -> bool:
    if isinstance(first, float) and isinstance(second, float):
        return math.isclose(first, second, rel_tol=1e-6) or (math.isnan(first) and math.isnan(second))
    return first == second
