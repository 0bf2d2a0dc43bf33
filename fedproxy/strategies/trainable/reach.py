"""What a low-rank change of a layer reaches: found by the model's structure, its code and a pass over a few tokens."""

import ast
import inspect
import textwrap
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedproxy.errors import ModelError, first_line
from fedproxy.models import Decoder
from fedproxy.models.decoder import positions_limit
from fedproxy.models.modes import evaluating
from fedproxy.models.quiet import without_reports

_TOKENS = 8
_FACTS = {"dtype", "device", "shape", "ndim", "is_meta"}
"""What code may ask of a weight without computing with it."""
_SET_UP = {"__init__", "reset_parameters", "extra_repr"}


def linear_layers(decoder: Decoder) -> dict[str, nn.Module]:
    """Return the linear layers inside the blocks by their name there (``0.self_attn.q_proj``), in the model's order."""
    return {n: module for n, module in decoder.blocks.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def expert_weights(decoder: Decoder) -> dict[str, nn.Parameter]:
    """Return the weights of routed experts, one tensor (experts, rows, columns) each, by their name in the blocks."""
    return {
        f"{name}.{leaf}": parameter
        for name, module in decoder.blocks.named_modules()
        for leaf, parameter in _expert_tensors(module).items()
    }


def is_router(name: str, decoder: Decoder) -> bool:
    """Say whether a linear layer says which experts a token goes to: it lies beside experts and has an output for each.

    Args:
        name: The layer's name in the blocks.
        decoder: The model.
    """
    outputs = decoder.blocks.get_parameter(f"{name}.weight").shape[0]
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        above = decoder.blocks.get_submodule(".".join(parts[:end]))
        held = [len(m) for m in above.children() if isinstance(m, nn.ModuleList)]
        held += [len(tensor) for m in above.children() for tensor in _expert_tensors(m).values()]
        if held:
            return outputs in held
    return False


def read_past(decoder: Decoder) -> set[str]:
    """Return the weights in the blocks that a module above computes with itself, on some device, by name in the blocks.

    Fused kernels of state-space layers take their projections' weights and never call them. The code of the modules'
    classes says so, also for a device that this machine does not have.
    """
    modules = dict(decoder.blocks.named_modules())
    kinds = {type(module) for module in modules.values()}
    read = {kind: _weights_read(kind) for kind in kinds}  # type: ignore[arg-type]  # mypy takes no class for hashable
    return {f"{name}.{weight}" for name, module in modules.items() for weight in read[type(module)]}


def shared_layers(decoder: Decoder) -> set[str]:
    """Return the linear layers in the blocks that are one module in several places, of which PEFT adapts one."""
    parents: dict[int, set[tuple[int, str]]] = {}
    for module in decoder.model.modules():
        for leaf, child in module._modules.items():
            parents.setdefault(id(child), set()).add((id(module), leaf))
    return {name for name, layer in linear_layers(decoder).items() if len(parents[id(layer)]) > 1}


@dataclass(frozen=True)
class Seen:
    """What one pass over a few tokens showed of some layers."""

    groups: list[list[str]]
    """The layers that ran once, grouped by the tensor that they read, in call order."""
    idle: set[str]
    """Layers that were never called, those of routed experts left out, which other tokens may go to."""
    mute: set[str]
    """Layers that nothing could train: what they give has no part in what the model says, or they read zeros alone."""


def observe(decoder: Decoder, layers: Mapping[str, nn.Module]) -> Seen:
    """Run a frozen model over a few tokens, and see what reaches some of its layers and what they reach.

    Args:
        decoder: The model; its mode and weights are left as they are.
        layers: Layers by name in the blocks.

    Raises:
        ModelError: If the model fails to run.
    """
    calls: list[tuple[str, Tensor]] = []
    pushes: dict[str, list[Tensor]] = {}
    generator = torch.Generator().manual_seed(0)
    whole = all(parameter.is_floating_point() for parameter in decoder.model.parameters())

    def before(name: str) -> Any:
        return lambda _, args: calls.append((name, args[0]))

    def after(name: str) -> Any:
        def push(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            size = torch.zeros((), device=output.device, requires_grad=True)
            pushes.setdefault(name, []).append(size)
            direction = torch.randn(output.shape, generator=generator).to(output.device, output.dtype)
            return output + size.to(output.dtype) * direction

        return push

    handles = [layer.register_forward_pre_hook(before(name)) for name, layer in layers.items()]
    handles += [layer.register_forward_hook(after(name)) for name, layer in layers.items() if whole]
    try:
        gradients = _gradients(decoder.model, pushes)
    finally:
        for handle in handles:
            handle.remove()
    heard = {name for name, gradient in gradients if gradient is not None and bool(gradient != 0)}
    order = [name for name, _ in calls]
    groups: dict[int, list[str]] = {}
    for name, tensor in calls:  # `calls` keeps the tensors alive, so that no two of them share an id
        if order.count(name) == 1:
            groups.setdefault(id(tensor), []).append(name)
    idle = {name for name in layers if name not in order and not _is_routed(name, decoder)}
    zeros = {name for name, read in calls if read.numel()} - {name for name, read in calls if read.any()}
    mute = {name for name in order if whole and name not in heard} | _starved(decoder, layers, zeros)
    return Seen(list(groups.values()), idle, mute)


def _starved(decoder: Decoder, layers: Mapping[str, nn.Module], zeros: set[str]) -> set[str]:
    """Return which of the layers that read zeros alone do so whatever the others give, as adapters in them may learn.

    Args:
        decoder: The model.
        layers: Layers by name in the blocks.
        zeros: Those that read zeros alone.
    """
    if not zeros:
        return zeros
    fed: set[str] = set()
    generator = torch.Generator().manual_seed(2)

    def disturb(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return output + torch.randn(output.shape, generator=generator).to(output.device, output.dtype)

    def note(name: str) -> Any:
        return lambda _, args: fed.update([name] if args[0].any() else ())

    handles = [layers[name].register_forward_hook(disturb) for name in layers if name not in zeros]
    handles += [layers[name].register_forward_pre_hook(note(name)) for name in zeros]
    try:
        _gradients(decoder.model, {})
    finally:
        for handle in handles:
            handle.remove()
    return _starved(decoder, layers, zeros - fed) if fed else zeros


def _gradients(model: PreTrainedModel, pushes: Mapping[str, list[Tensor]]) -> list[tuple[str, Tensor | None]]:
    """Run the model and return the gradient of its logits, weighted at random, in the sizes that hooks put into it."""
    ids = torch.arange(positions_limit(model, _TOKENS), device=model.device)[None]
    try:
        with evaluating(model), without_reports(), torch.enable_grad():
            logits = model(input_ids=ids, use_cache=False).logits.float()
            named = [(name, size) for name, sizes in pushes.items() for size in sizes]
            if not named:
                return []
            direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(logits.device)
            found = torch.autograd.grad(logits, [size for _, size in named], direction, allow_unused=True)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # code of any family runs here
        raise ModelError(
            f"{type(model).__name__} fails on a few tokens: {first_line(error)}; choose other trainable.modules"
        ) from error
    return [(name, gradient) for (name, _), gradient in zip(named, found, strict=True)]


def _is_routed(name: str, decoder: Decoder) -> bool:
    """Say whether a layer lies in a list inside its block that something has an output for each entry of: a router.

    A list without one holds parts of which a block uses always the same.
    """
    parts = name.split(".")
    for end in range(2, len(parts)):
        held = decoder.blocks.get_submodule(".".join(parts[:end]))
        if isinstance(held, nn.ModuleList):
            inside = {id(weight) for weight in held.parameters()}
            beside = (w for w in decoder.blocks.get_submodule(parts[0]).parameters() if id(w) not in inside)
            return any(weight.ndim == 2 and weight.shape[0] == len(held) for weight in beside)
    return False


def _expert_tensors(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the tensors of three dimensions of a module that holds such and no layer beside them; not convolutions."""
    if isinstance(module, nn.modules.conv._ConvNd) or any(list(child.parameters()) for child in module.children()):
        return {}
    own = module.named_parameters(recurse=False)
    return {leaf: parameter for leaf, parameter in own if parameter.ndim == 3 and min(parameter.shape) > 1}


@cache
def _weights_read(kind: type[nn.Module]) -> frozenset[str]:
    """Return the weights of its children (``out_proj.weight``) that a class' own code computes with."""
    found: set[str] = set()
    for part in kind.__mro__:
        if part is nn.Module or not issubclass(part, nn.Module):
            continue
        with suppress(OSError, TypeError, SyntaxError):
            found |= _read_in(ast.parse(textwrap.dedent(inspect.getsource(part))))
    return frozenset(found)


def _read_in(tree: ast.AST) -> set[str]:
    """Return what a class reads of its children, as ``child.attribute``.

    What is asked for a fact (dtype, shape) is left out, and what is read in slices: so some families emulate, where
    their configuration asks for it, how a layer was once computed on several devices.
    """
    found, asked = set(), set()
    for node in ast.walk(tree):  # from the outside in: x.weight.dtype before x.weight
        if isinstance(node, ast.FunctionDef) and node.name in _SET_UP:
            asked |= {id(inner) for inner in ast.walk(node)}
        if isinstance(node, ast.Subscript) or (isinstance(node, ast.Attribute) and node.attr in _FACTS):
            asked.add(id(node.value))
        elif isinstance(node, ast.Attribute) and id(node) not in asked and (path := _path(node)).count("."):
            found.add(path)
    return found


def _path(node: ast.expr) -> str:
    """Return ``a.b`` of the expression ``self.a.b``, and nothing of any other."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join(reversed(parts)) if isinstance(node, ast.Name) and node.id == "self" else ""
