"""A model whose weights are spread over the processes that train it: each holds a part of every tensor (FSDP).

A sharded parameter is a ``DTensor`` cut along its first dimension; everything else is an ordinary tensor, for which
these functions do nothing but the obvious.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from fedproxy.models.decoder import Decoder


def shard(model: PreTrainedModel, mesh: DeviceMesh) -> dict[int, nn.Parameter]:
    """Spread a model's weights over the processes of a mesh, block by block, in place.

    A block's weights are gathered when it runs and let go afterwards; gradients are averaged over the processes, each
    of which keeps its part.

    Args:
        model: The same model in every process, on any device.
        mesh: One dimension.

    Returns:
        Each parameter's successor, by the ``id`` of the parameter that it stands for.
    """
    before = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
    ]
    for block in Decoder.of(model).blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return {id(parameter): getattr(module, name) for module, name, parameter in before}


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with all its parts; all processes must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_like(tensor: Tensor, own: Tensor) -> Tensor:
    """Return the part of a whole tensor that this process holds of ``own``, in its dtype and on its device."""
    tensor = tensor.to(own.device, own.dtype)
    if not isinstance(own, DTensor):
        return tensor
    return distribute_tensor(tensor, own.device_mesh, own.placements, src_data_rank=None).to_local()


@torch.no_grad()
def assign(own: Tensor, tensor: Tensor) -> None:
    """Copy a whole tensor, which every process has, into a parameter."""
    target = own.to_local() if isinstance(own, DTensor) else own
    target.copy_(part_like(tensor, own))


def local_parts(parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Return this process's parts of sharded parameters as plain ones that share values and gradients with them.

    Others are returned as they are.
    """
    return {name: _local(own) if isinstance(own, DTensor) else own for name, own in parameters.items()}


def is_sharded(parameters: Mapping[str, Tensor]) -> bool:
    """Say whether the parameters are spread over processes."""
    return any(isinstance(own, DTensor) for own in parameters.values())


def _local(own: nn.Parameter) -> nn.Parameter:
    part = nn.Parameter(own.detach().to_local(), requires_grad=own.requires_grad)  # type: ignore[attr-defined]
    if own.requires_grad:
        if own.grad is None:
            own.grad = torch.zeros_like(own)
        part.grad = own.grad.to_local()  # type: ignore[attr-defined]
    return part
