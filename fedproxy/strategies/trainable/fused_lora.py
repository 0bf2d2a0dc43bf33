"""One autograd step per group of LoRA layers, equal to PEFT's forward and cheaper.

PEFT runs a frozen product, two low-rank products, a scaling and a sum per layer, and autograd keeps a node for each.
Here all layers that read one tensor (query, key and value; gate and up) are one node: their A's are one product, the
low-rank part is added in place, and the input's gradient is gathered in place.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

_BASES = (nn.Linear, Conv1D)


def fuse(groups: Sequence[Sequence[LoraLayer]], adapter: str) -> None:
    """Let LoRA layers run fused wherever that is exact, and as PEFT's own otherwise.

    Under autocast all products are in its dtype, as PEFT's are. A layer falls back to PEFT's forward, call by call,
    under dropout, mixed dtypes without autocast, quantised or sharded weights and a merged or disabled adapter.

    Args:
        groups: LoRA layers of one rank and scale that read one tensor, in call order. Others than plain linear ones
            are skipped.
        adapter: PEFT's name of the adapter.
    """
    for layers in groups:
        plain = [layer for layer in layers if type(layer) is LoraLinear and type(layer.get_base_layer()) in _BASES]
        group = _Group(plain, adapter)
        for layer in plain:
            layer.__class__ = FusedLoraLinear
            layer.group = group


class FusedLoraLinear(LoraLinear):  # type: ignore[misc]
    """PEFT's LoRA layer with a fused forward where possible."""

    group: "_Group"

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return base(x) + scale * B A x, of shape (..., out)."""
        if args or kwargs or not _fusible(self, x, self.group.adapter):
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        return self.group.forward(self, x)


@dataclass(eq=False)
class _Group:
    """Layers that read one tensor, in call order; the first to be called computes for all."""

    layers: list[FusedLoraLinear]
    adapter: str
    shared: bool = True
    read: Tensor | None = None
    waiting: dict[int, Tensor] = field(default_factory=dict)

    def forward(self, layer: FusedLoraLinear, x: Tensor) -> Tensor:
        if self.read is x and id(layer) in self.waiting:
            result = self.waiting.pop(id(layer))
            if not self.waiting:
                self.read = None
            return result
        if self.waiting:
            # Somebody hands each layer its own copy of the input: compute one by one from now on.
            self.waiting, self.read, self.shared = {}, None, False
        together = self.shared and layer is self.layers[0]
        layers = [layer]
        if together:
            layers += [other for other in self.layers[1:] if _fusible(other, x, self.adapter)]
        outputs = _run(layers, x, self.adapter)
        if len(layers) > 1:
            self.read = x
            self.waiting = {id(other): output for other, output in zip(layers[1:], outputs[1:], strict=True)}
        return outputs[0]


def _fusible(layer: LoraLinear, x: Tensor, adapter: str) -> bool:
    """Say whether the fused forward is exact for this layer and input."""
    if layer.disable_adapters or layer.merged or layer.active_adapters != [adapter] or layer.lora_variant:
        return False
    dropout = layer.lora_dropout[adapter]
    if dropout.training and not isinstance(dropout, nn.Identity):
        return False
    weight, a = layer.get_base_layer().weight, layer.lora_A[adapter].weight
    whole = weight.ndim == 2 and not weight.requires_grad and type(weight.data) is Tensor
    floats = weight.is_floating_point() and x.is_floating_point()
    one_dtype = x.dtype == weight.dtype == a.dtype
    return whole and (one_dtype or (floats and torch.is_autocast_enabled(x.device.type)))


def _run(layers: Sequence[LoraLinear], x: Tensor, adapter: str) -> tuple[Tensor, ...]:
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    flat = x.reshape(-1, x.shape[-1])
    weights: list[Tensor | None] = []
    for layer in layers:
        base = layer.get_base_layer()
        weight = base.weight.T if isinstance(base, Conv1D) else base.weight
        weights += [weight, base.bias, layer.lora_A[adapter].weight, layer.lora_B[adapter].weight]
    scale = layers[0].scaling[adapter]
    outputs = _LowRankLinears.apply(flat, dtype, scale, *weights)  # type: ignore[no-untyped-call]
    return tuple(output.view(*x.shape[:-1], output.shape[-1]) for output in outputs)


class _LowRankLinears(torch.autograd.Function):
    """y_i = x W_i^T + b_i + s (x A_i^T) B_i^T for several i, with gradients for x, A_i and B_i.

    dx = sum_i g_i W_i + s u A;  dA_i = s u_i^T x;  dB_i = s g_i^T (x A_i^T);  u_i = g_i B_i.
    x: (tokens, in); W_i: (out_i, in); A_i: (r, in); B_i: (out_i, r). Products and outputs are in ``dtype``, gradients
    in that of what they belong to.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, scale: float, *weights: Any) -> tuple[Tensor, ...]:
        w, bias, a, full_b = (weights[part::4] for part in range(4))
        ctx.dtypes = x.dtype, a[0].dtype
        x, stacked = x.to(dtype), (a[0] if len(a) == 1 else torch.cat(a)).to(dtype)
        b = [b_i.to(dtype) for b_i in full_b]
        with torch.autocast(x.device.type, enabled=False):
            low = x @ stacked.T
            outputs = []
            for w_i, bias_i, b_i, low_i in zip(w, bias, b, low.chunk(len(a), dim=1), strict=True):
                wide = w_i.to(dtype).T
                output = x @ wide if bias_i is None else torch.addmm(bias_i.to(dtype), x, wide)
                outputs.append(output.addmm_(low_i, b_i.T, alpha=scale))
        # Frozen weights are kept as they are: casting them once more costs less than holding a copy of each.
        ctx.save_for_backward(x, low, stacked, *w, *b)
        ctx.scale = scale
        ctx.set_materialize_grads(True)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, low, stacked, *rest = ctx.saved_tensors
        count = len(grads)
        w, b = rest[:count], rest[count:]
        back = torch.cat([grad @ b_i for grad, b_i in zip(grads, b, strict=True)], dim=1)
        read, trained = ctx.dtypes
        dx = None
        if ctx.needs_input_grad[0]:
            dx = grads[0] @ w[0].to(x.dtype)
            for grad, w_i in zip(grads[1:], w[1:], strict=True):
                dx.addmm_(grad, w_i.to(x.dtype))
            dx = dx.addmm_(back, stacked, alpha=ctx.scale).to(read)
        da = (back.T @ x).to(trained).mul_(ctx.scale).chunk(count)
        # (g^T low) as (low^T g)^T: a short and wide product is several times faster than a tall and thin one.
        lows = low.chunk(count, dim=1)
        db = [(low_i.T @ grad).to(trained).mul_(ctx.scale).T for grad, low_i in zip(grads, lows, strict=True)]
        result: list[Tensor | None] = [dx, None, None]
        for da_i, db_i in zip(da, db, strict=True):
            result += [None, None, da_i, db_i]
        return tuple(result)
