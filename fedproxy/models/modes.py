"""Training and evaluation mode of a model's modules, and states that its head can multiply at once."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode for the length of a context; then each of its modules has its own mode again.

    Modules may differ: who tunes a part of a model often keeps the rest in evaluation mode. Meanwhile the head gets
    states that lie side by side.
    """
    before = [(module, module.training) for module in model.modules()]
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    hook = head.register_forward_pre_hook(_without_gaps) if isinstance(head, nn.Module) else None
    model.eval()
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()
        for module, training in before:
            module.training = training


def _without_gaps(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Copy half-precision states that do not lie side by side, as those of generation's last positions do not.

    PyTorch's product of such a batch on the CPU copies the weight once per row and takes a thousand times as long.
    """
    return tuple(states if states.dtype == torch.float32 else states.contiguous() for states in inputs)
