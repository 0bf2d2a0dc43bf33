"""Running a model without some of its blocks, weights and all else left in place."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedproxy.models.decoder import Decoder


@contextmanager
def skipping(decoder: Decoder, skipped: Sequence[int]) -> Iterator[None]:
    """Let these blocks hand on what they are given for the length of the context; run without a cache meanwhile."""
    forms = _forms(decoder) if skipped else []
    for index in skipped:
        decoder.blocks[index].forward = forms[index].identity
    try:
        yield
    finally:
        for index in skipped:
            del decoder.blocks[index].forward  # the class's own is seen again


@dataclass(frozen=True)
class _Form:
    """In what form a block gives its hidden state."""

    bare: bool
    """As a tensor, and not as the first entry of a tuple."""
    carried: tuple[str | None, ...] = ()
    """The tuple's further entries: the argument by which the next block is given this one, or None."""

    def identity(self, *args: Any, **kwargs: Any) -> Any:
        """Return what a block is given, in the form of what it returns."""
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        return hidden if self.bare else (hidden, *(kwargs.get(name) if name else None for name in self.carried))


@torch.no_grad()
def _forms(decoder: Decoder) -> list[_Form]:
    """Return every block's form, seen in a pass over one token."""
    given: list[dict[str, Any]] = []
    returned: list[Any] = []

    def see(_: nn.Module, __: Any, kwargs: dict[str, Any], output: Any) -> None:
        given.append(kwargs)
        returned.append(output)

    handles = [block.register_forward_hook(see, with_kwargs=True) for block in decoder.blocks]
    try:
        ids = torch.zeros((1, 1), dtype=torch.long, device=decoder.model.device)
        decoder.body(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    forms = [_form(output, after) for output, after in zip(returned, given[1:], strict=False)]
    last = returned[-1]
    return [*forms, _Form(True) if isinstance(last, Tensor) else _Form(False, _names_like(forms, len(last) - 1))]


def _form(output: Any, after: dict[str, Any]) -> _Form:
    if isinstance(output, Tensor):
        return _Form(True)
    named = {id(value): name for name, value in after.items() if value is not None}
    return _Form(False, tuple(named.get(id(extra)) for extra in output[1:]))


def _names_like(forms: Sequence[_Form], entries: int) -> tuple[str | None, ...]:
    """Return what the blocks before the last carry on, since no block follows the last to see it from."""
    return next((form.carried for form in reversed(forms) if len(form.carried) == entries), (None,) * entries)
