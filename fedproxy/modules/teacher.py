"""What distillation needs of a model's forward pass, and a cache of the teacher's."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedproxy.models.decoder import Decoder, hidden_state

Outputs = dict[str, Tensor]


def observe(model: PreTrainedModel, batch: Mapping[str, Tensor], blocks: Sequence[int]) -> Outputs:
    """Run a model and return hidden states of its real tokens.

    The last block's output is taken before the final norm, unlike the last of transformers' ``hidden_states``.

    Args:
        model: A causal language model.
        batch: ``input_ids`` and ``attention_mask``, int64 (batch, length), padded on the right.
        blocks: Indices of the blocks to look at.

    Returns:
        ``head``: what enters the output head, (tokens, hidden); ``block_<i>``: what block i puts out, (tokens, hidden);
        ``logits`` (tokens, vocabulary). Tokens in row-major order, padding left out.
    """
    real = batch["attention_mask"].bool()
    seen: Outputs = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            seen[name] = hidden_state(output)[real]

        return hook

    def at_head(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        seen["head"] = inputs[0][real]
        return seen["head"].unsqueeze(0), *inputs[1:]

    stack = Decoder.of(model).blocks
    handles = [stack[index].register_forward_hook(keep(f"block_{index}")) for index in blocks]
    handles.append(model.get_output_embeddings().register_forward_pre_hook(at_head))
    try:
        seen["logits"] = model(input_ids=batch["input_ids"], use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    return seen


def logits_of(model: PreTrainedModel, head: Tensor) -> Tensor:
    """Return the logits (tokens, vocabulary) of hidden states that enter the head, (tokens, hidden).

    The model runs over one token, and its head is handed the given states instead: whatever the family does to its
    logits is done by its own code.
    """
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda _, inputs: (head.unsqueeze(0).to(inputs[0].dtype), *inputs[1:])
    )
    try:
        token = torch.zeros((1, 1), dtype=torch.long, device=head.device)
        logits: Tensor = model(input_ids=token, use_cache=False).logits[0]
    finally:
        hook.remove()
    return logits


class TeacherCache:
    """A frozen teacher's hidden states, remembered by text, so that later epochs need not run it.

    Texts are looked up one by one, whatever batch and order they come in. Logits are not kept (they are as wide as
    the vocabulary) but computed again by the head.

    Args:
        teacher: The teacher, in evaluation mode.
        blocks: Indices of the teacher's blocks to look at.
        store: ``None`` remembers nothing, ``"memory"`` keeps hidden states on the CPU, a folder keeps them on disk.
    """

    def __init__(self, teacher: PreTrainedModel, blocks: Sequence[int], store: str | Path | None = None) -> None:
        self.teacher, self.blocks = teacher, tuple(blocks)
        self._folder = None if store in (None, "memory") else Path(str(store))
        self._remembers = store is not None
        self._memory: dict[str, Outputs] = {}

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Tensor]) -> Outputs:
        """Return what :func:`observe` gives for the teacher, without gradient."""
        if not self._remembers:
            return observe(self.teacher, batch, self.blocks)
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        keys = [_key(row[:length]) for row, length in zip(batch["input_ids"], lengths, strict=True)]
        rows = [self._recall(key) for key in keys]
        if any(row is None for row in rows):
            outputs = observe(self.teacher, batch, self.blocks)
            names = [name for name in outputs if name != "logits"]
            parts = {name: torch.split(outputs[name], lengths) for name in names}
            for index, key in enumerate(keys):
                self._remember(key, {name: parts[name][index].cpu().clone() for name in names})
            return outputs
        device = batch["input_ids"].device
        found = {name: torch.cat([row[name] for row in rows if row]).to(device) for name in rows[0] or {}}
        return {**found, "logits": logits_of(self.teacher, found["head"])}

    def _recall(self, key: str) -> Outputs | None:
        if self._folder is None:
            return self._memory.get(key)
        path = self._folder / f"{key}.safetensors"
        return load_file(path) if path.exists() else None

    def _remember(self, key: str, outputs: Outputs) -> None:
        if self._folder is None:
            self._memory[key] = outputs
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        part = self._folder / f"{key}.part"
        save_file(outputs, part)
        part.rename(self._folder / f"{key}.safetensors")


def _key(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.cpu().numpy().tobytes()).hexdigest()
