"""The gradient of each row of a batch, clipped: in one backward pass for linear layers, else row by row."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fedproxy.errors import ClientError


class RowGradients:
    """Gradients of single rows, from activations and output gradients (Goodfellow 2015, arXiv 1510.01799).

    Between :meth:`of` and its end every trained linear layer notes, in the backward pass, what each row adds to its
    weight's gradient: g^T x over the row's tokens. Layers that run several times, and blocks that are run again instead
    of keeping their activations, are right as well. Fused LoRA layers run as PEFT's own meanwhile.

    Args:
        model: The model; rows may meet nowhere in it.
        tuned: What is trained, by name; parameters of other than linear layers make :attr:`by_layer` false.
    """

    def __init__(self, model: nn.Module, tuned: Mapping[str, nn.Parameter]) -> None:
        self.tuned = dict(tuned)
        names = {id(parameter): name for name, parameter in self.tuned.items()}
        # PEFT reads the factors of experts' weights without calling them.
        apart = {id(own) for m in model.modules() if isinstance(m, ParamWrapper) for own in m.parameters()}
        linear = [m for m in model.modules() if type(m) is nn.Linear and id(m.weight) in names and m.bias is None]
        self._layers = {names[id(m.weight)]: m for m in linear if id(m.weight) not in apart}
        lora = (module for module in model.modules() if isinstance(module, LoraLinear))
        self._fused: list[tuple[nn.Module, type]] = [(m, type(m)) for m in lora if type(m) is not LoraLinear]
        self._rows = 0
        self._found: dict[str, Tensor] = {}

    @property
    def by_layer(self) -> bool:
        """Whether one backward pass gives the gradients of all rows; else it is one row to a pass."""
        return len(self._layers) == len(self.tuned)

    @contextmanager
    def of(self, rows: int) -> Iterator[None]:
        """Note the gradients of a batch of ``rows`` rows, whose loss is a sum over rows, for the length of the context.

        Raises:
            ClientError: From the forward pass, if a layer reads the rows mixed.
        """
        self._rows, self._found = rows, {}
        for fused, _ in self._fused if self.by_layer else ():
            fused.__class__ = LoraLinear
        for name, layer in self._layers.items() if self.by_layer else ():
            layer.__dict__["forward"] = _Noting(self, name, layer)
        try:
            yield
        finally:
            for layer in self._layers.values():
                layer.__dict__.pop("forward", None)
            for fused, kind in self._fused:
                fused.__class__ = kind

    def clipped_sum(self, clip: float) -> dict[str, Tensor]:
        """Return the sum over rows of the gradients, each scaled down to a norm of at most ``clip``; then forget them.

        A row whose gradient is not finite adds nothing.

        Args:
            clip: Largest L2 norm over all parameters; infinity keeps all gradients as they are.

        Returns:
            float32 by name.

        Raises:
            ClientError: If a gradient came by another way than a layer.
        """
        if not self.by_layer:
            return self._clipped_row(clip)
        if beside := sorted(name for name, own in self.tuned.items() if own.grad is not None):
            raise ClientError(
                f"privacy.unit=example needs each row by itself, and the model reads {beside[0]} without calling its "
                "layer; train other trainable.modules or use privacy.unit=client"
            )
        found, self._found = self._found, {}
        norms = _norms(found)
        kept = _kept(norms, clip)
        for rows in found.values():
            rows[~norms.isfinite()] = 0
        sums = {name: (kept @ rows.flatten(1)).view(rows.shape[1:]) for name, rows in found.items()}
        return {name: sums.get(name, torch.zeros_like(own, dtype=torch.float32)) for name, own in self.tuned.items()}

    def note(self, name: str, x: Tensor, gradient: Tensor) -> None:
        """Add what a pass through a layer gives: x (rows, ..., in), gradient (rows, ..., out)."""
        rows = len(x)
        one = torch.bmm(gradient.reshape(rows, -1, gradient.shape[-1]).mT, x.reshape(rows, -1, x.shape[-1])).float()
        self._found[name] = self._found[name].add_(one) if name in self._found else one

    def check(self, name: str, x: Tensor) -> None:
        """Refuse an input in which rows cannot be told apart.

        Raises:
            ClientError: Naming the layer.
        """
        if x.ndim < 3 or len(x) != self._rows:
            raise ClientError(
                f"privacy.unit=example needs each row by itself, and {name} reads shape {tuple(x.shape)} of "
                f"{self._rows} rows; switch packing off, train other trainable.modules or use privacy.unit=client"
            )

    def _clipped_row(self, clip: float) -> dict[str, Tensor]:
        assert self._rows == 1, "without by_layer a pass has one row"
        grads = {
            name: torch.zeros_like(own, dtype=torch.float32) if own.grad is None else own.grad.float()
            for name, own in self.tuned.items()
        }
        norm = torch.stack([torch.linalg.vector_norm(g) for g in grads.values()]).norm()
        kept = _kept(norm, clip)
        result = {name: grad * kept if norm.isfinite() else torch.zeros_like(grad) for name, grad in grads.items()}
        for own in self.tuned.values():
            own.grad = None
        return result


def _norms(gradients: Mapping[str, Tensor]) -> Tensor:
    """Return the norm of each row's gradient over all parameters, (rows)."""
    each = torch.stack([torch.linalg.vector_norm(gradient.flatten(1), dim=1) for gradient in gradients.values()])
    total: Tensor = torch.linalg.vector_norm(each, dim=0)
    return total


def _kept(norms: Tensor, clip: float) -> Tensor:
    """Return by how much gradients of these norms are scaled; not finite ones are 0."""
    share = torch.clamp(clip / norms.clamp_min(torch.finfo(torch.float32).tiny), max=1.0)
    return torch.where(norms.isfinite(), share, torch.zeros_like(norms))


class _Noting:
    """A linear layer's forward that also notes the gradients of its rows."""

    def __init__(self, sink: RowGradients, name: str, layer: nn.Module) -> None:
        self.sink, self.name, self.layer = sink, name, layer

    def __call__(self, x: Tensor) -> Tensor:
        self.sink.check(self.name, x)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        result: Tensor = _Linear.apply(x, self.layer.weight, dtype, self.sink, self.name)  # type: ignore[no-untyped-call]
        return result


class _Linear(torch.autograd.Function):
    """y = x W^T; the backward pass hands x and the gradient of y to a sink instead of W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype, sink: RowGradients, name: str) -> Tensor:
        ctx.read, ctx.sink, ctx.name = x.dtype, sink, name
        x, cast = x.to(dtype), weight.to(dtype)
        ctx.save_for_backward(x, cast)
        with torch.autocast(x.device.type, enabled=False):
            return x @ cast.T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        ctx.sink.note(ctx.name, x, gradient)
        dx = (gradient @ weight).to(ctx.read) if ctx.needs_input_grad[0] else None
        return dx, None, None, None, None
