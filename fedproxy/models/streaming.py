"""Running a model on a device that cannot hold it: its blocks come there one at a time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedproxy.models.decoder import Decoder
from fedproxy.models.mapped import release

_SPARE = 0.8
"""Share of the device's free memory that a whole model may take; the rest is for activations."""


def fits(model: PreTrainedModel, device: torch.device) -> bool:
    """Say whether a whole model can be moved to the device with room to work."""
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    needed: int = sum(tensor.nbytes for tensor in model.parameters())
    return needed <= int(_SPARE * free)


@contextmanager
def streamed(
    model: PreTrainedModel, device: torch.device, *, move: Callable[[Tensor], Tensor] | None = None
) -> Iterator[PreTrainedModel]:
    """Hold embedding, norm and head on ``device`` and bring each block there for as long as it runs.

    The weights' own tensors stay where they are and are put back afterwards: nothing is copied back.

    Args:
        model: The model, as a whole on its home device; forward passes only.
        device: Where its forward runs.
        move: How a tensor gets there; ``tensor.to(device)`` by default.
    """
    bring = move or (lambda tensor: tensor.to(device, non_blocking=True))
    decoder = Decoder.of(model)
    inside = {id(module) for module in decoder.blocks.modules()}
    homes = _replace([module for module in model.modules() if id(module) not in inside], bring)
    away: dict[int, list[tuple[dict[str, Any], str, Tensor]]] = {}

    def come(block: nn.Module, _: Any) -> None:
        away[id(block)] = _replace(block.modules(), bring)

    def go(block: nn.Module, _: Any, __: Any) -> None:
        _restore(away.pop(id(block)))

    handles = [block.register_forward_pre_hook(come) for block in decoder.blocks]
    handles += [block.register_forward_hook(go, always_call=True) for block in decoder.blocks]
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()
        _restore(homes)


def _replace(modules: Any, bring: Callable[[Tensor], Tensor]) -> list[tuple[dict[str, Any], str, Tensor]]:
    """Replace the tensors of modules and return what was there; a tensor in two places stays one."""
    brought: dict[int, Tensor] = {}
    homes: list[tuple[dict[str, Any], str, Tensor]] = []
    for module in modules:
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is None:
                    continue
                homes.append((store, name, tensor))
                if id(tensor) not in brought:
                    there = bring(tensor.data)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    brought[id(tensor)] = nn.Parameter(there, requires_grad=False) if is_parameter else there
                store[name] = brought[id(tensor)]
    return homes


def _restore(homes: list[tuple[dict[str, Any], str, Tensor]]) -> None:
    for store, name, tensor in homes:
        store[name] = tensor


@contextmanager
def released_by_block(*models: PreTrainedModel) -> Iterator[None]:
    """Give back the memory of mapped weights whenever a block has run, for the length of the context."""
    blocks = [block for model in models for block in Decoder.of(model).blocks]
    handles = [block.register_forward_hook(lambda *_: release()) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def placed(model: PreTrainedModel, device: torch.device) -> Iterator[PreTrainedModel]:
    """Hold a model on ``device`` for the length of the context, then bring it back.

    A model that the device cannot hold stays where it is, and its blocks come to the device one at a time: enough for
    forward passes. One that works on the device already is left as it is.
    """
    home = model.device
    if home == device:  # as it seems of a model whose blocks another context brings there
        yield model
        return
    if not fits(model, device):
        with streamed(model, device):
            yield model
        return
    model.to(device)
    try:
        yield model
    finally:
        model.to(home)
