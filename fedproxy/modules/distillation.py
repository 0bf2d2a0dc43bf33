"""Distillation of the target into the proxy on public text, before any client sees the proxy."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import lightning
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedproxy.data.batching import ShuffledBatches
from fedproxy.errors import ConfigError, ModelError
from fedproxy.models.decoder import Decoder
from fedproxy.models.layer_map import LayerMap
from fedproxy.modules.losses import distillation_kl, hidden_distance
from fedproxy.modules.teacher import TeacherCache, observe
from fedproxy.modules.trainer import fit, make_trainer

_MAX_GRAD_NORM = 1.0


class Settings(Protocol):
    """The options of a recipe's ``distillation`` node that a fit needs."""

    @property
    def steps(self) -> int:
        """Optimiser steps, >= 1."""
        ...

    @property
    def lr(self) -> float:
        """Learning rate of AdamW, constant."""
        ...

    @property
    def temperature(self) -> float:
        """Softens both distributions."""
        ...

    @property
    def kl_weight(self) -> float:
        """Weight of KL(target || proxy)."""
        ...

    @property
    def hidden_weight(self) -> float:
        """Weight of the hidden states' distance."""
        ...

    @property
    def cache_teacher(self) -> bool:
        """Keep the target's hidden states in memory for further epochs."""
        ...


class DistillationModule(lightning.LightningModule):  # type: ignore[misc]
    """Trains the proxy's blocks to imitate the target on public text.

    Loss = ``kl_weight`` * KL(target || proxy) over next-token distributions + ``hidden_weight`` * the mean over the
    proxy's blocks j of the distance between its block j and the target's block pi(j) (:func:`hidden_distance`;
    FedBiOT's alignment over kept blocks). Both are means over real tokens.

    Choice: the embedding, the final norm and the head stay as they are, since the plug-in keeps the target's own;
    ``whole`` trains them too.

    Args:
        student: The proxy.
        teacher: The target; frozen, never part of the module's state or checkpoints.
        proxy_to_target: pi, the target's block behind each block of the proxy.
        lr: Learning rate of AdamW, > 0, constant.
        kl_weight: Weight of the divergence, >= 0.
        hidden_weight: Weight of the hidden states' distance, >= 0; one of the two weights must be positive.
        temperature: Softens both distributions, > 0.
        weight_decay: Decoupled weight decay, >= 0.
        whole: Train every weight of the proxy.
        teacher_cache: None runs the target on every batch; ``"memory"`` or a folder keeps its hidden states by text.

    Raises:
        ConfigError: If a number is out of range.
        ModelError: If the two models do not fit each other.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        proxy_to_target: Sequence[int],
        *,
        lr: float,
        kl_weight: float = 1.0,
        hidden_weight: float = 0.0,
        temperature: float = 1.0,
        weight_decay: float = 0.0,
        whole: bool = False,
        teacher_cache: str | Path | None = None,
    ) -> None:
        super().__init__()
        rules = {
            "lr": (lr, lr > 0, "> 0"),
            "temperature": (temperature, temperature > 0, "> 0"),
            "kl_weight": (kl_weight, kl_weight >= 0, ">= 0"),
            "hidden_weight": (hidden_weight, hidden_weight >= 0, ">= 0"),
            "weight_decay": (weight_decay, weight_decay >= 0, ">= 0"),
        }
        for name, (value, ok, rule) in rules.items():
            if not ok:
                raise ConfigError(f"distillation.{name} must be {rule}, got {value}")
        if kl_weight == hidden_weight == 0:
            raise ConfigError("distillation needs kl_weight > 0 or hidden_weight > 0, got 0 for both")
        check_pair(student, teacher, proxy_to_target)
        self.student = student
        self.lr, self.weight_decay, self.temperature = lr, weight_decay, temperature
        self.kl_weight, self.hidden_weight = kl_weight, hidden_weight
        self.pairs = tuple(enumerate(proxy_to_target)) if hidden_weight else ()
        # In a tuple, Lightning does not take the teacher for a part of this module.
        self._teacher = (teacher.requires_grad_(False).eval(),)
        self.teach = TeacherCache(teacher, sorted({target for _, target in self.pairs}), teacher_cache)
        self.losses: list[Tensor] = []
        """Loss of every step so far, 0-dim, on the module's device."""
        student.requires_grad_(whole)
        if not whole:
            Decoder.of(student).blocks.requires_grad_(True)

    def on_train_start(self) -> None:
        """Switch the student to training and bring the teacher to its device."""
        self.student.train()
        self._teacher[0].to(self.device)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of one batch of public text."""
        wanted = self.teach(batch)
        got = observe(self.student, batch, [own for own, _ in self.pairs])
        kl = (
            distillation_kl(got["logits"], wanted["logits"], self.temperature)
            if self.kl_weight
            else got["head"].new_zeros(())
        )
        hidden = kl.new_zeros(())
        if self.pairs:
            distances = [hidden_distance(got[f"block_{own}"], wanted[f"block_{target}"]) for own, target in self.pairs]
            hidden = torch.stack(distances).mean()
        self.log("distillation/kl", kl.detach())
        self.log("distillation/hidden", hidden.detach())
        loss = self.kl_weight * kl + self.hidden_weight * hidden
        self.losses.append(loss.detach())
        return loss

    def on_train_end(self) -> None:
        """Leave the student frozen and ready to be used."""
        self.student.eval().requires_grad_(False)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW over the trained weights with a constant learning rate."""
        tuned = [parameter for parameter in self.student.parameters() if parameter.requires_grad]
        kind: dict[str, Any] = {"fused": True} if all(p.device.type == "cpu" for p in tuned) else {}
        if "mixed" in str(self.trainer.precision):
            kind = {}  # Lightning cannot clip in front of the fused kernel under mixed precision
        return torch.optim.AdamW(tuned, lr=self.lr, weight_decay=self.weight_decay, **kind)


def distil(
    proxy: PreTrainedModel,
    target: PreTrainedModel,
    batches: Sequence[dict[str, Tensor]],
    *,
    settings: Settings,
    layer_map: LayerMap,
    trainer: Mapping[str, Any],
    generator: torch.Generator,
) -> float:
    """Distil the target into the proxy, in place.

    Args:
        proxy: The student.
        target: The teacher; left as it is but frozen.
        batches: ``input_ids`` and ``attention_mask`` of public text, int64 (batch, length), padded on the right; gone
            over in a new order per epoch until the steps are done.
        settings: Steps, learning rate, weights of the losses.
        layer_map: The map that the proxy was compressed with.
        trainer: Options of lightning.Trainer.
        generator: CPU generator of the order and of dropout.

    Returns:
        Mean loss of the last ten steps.

    Raises:
        ConfigError: If an option is out of range.
        ModelError: If the two models do not fit each other.
    """
    module = DistillationModule(
        proxy,
        target,
        layer_map.proxy_to_target,
        lr=settings.lr,
        kl_weight=settings.kl_weight,
        hidden_weight=settings.hidden_weight,
        temperature=settings.temperature,
        teacher_cache="memory" if settings.cache_teacher else None,
    )
    seed = int(torch.randint(2**62, (), generator=generator))
    runner = make_trainer(trainer, max_epochs=-1, max_steps=settings.steps, max_grad_norm=_MAX_GRAD_NORM)
    fit(runner, module, ShuffledBatches(batches, generator), seed=seed)
    return float(torch.stack(module.losses[-10:]).double().mean())


def check_pair(student: PreTrainedModel, teacher: PreTrainedModel, proxy_to_target: Sequence[int]) -> None:
    """Check that hidden states and logits of the two models can be compared.

    Raises:
        ModelError: If widths, vocabularies or the layer map do not fit.
    """
    for what, pick in (("vocabulary", "get_output_embeddings"), ("input vocabulary", "get_input_embeddings")):
        mine, theirs = (tuple(getattr(model, pick)().weight.shape) for model in (student, teacher))
        if mine != theirs:
            raise ModelError(
                f"the proxy's {what} has shape {mine}, the target's {theirs} (tokens, hidden size); "
                "compress the proxy from this target"
            )
    blocks, depth = len(Decoder.of(student)), len(Decoder.of(teacher))
    if len(proxy_to_target) != blocks or any(not 0 <= index < depth for index in proxy_to_target):
        raise ModelError(
            f"the layer map {list(proxy_to_target)} does not fit a proxy of {blocks} and a target of {depth} blocks; "
            "use the map that the proxy was compressed with"
        )


def check_same_tokenizer(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Check that two tokenizers give the same tokens the same ids.

    Raises:
        ModelError: If a token or a special token differs.
    """
    mine, theirs = student.get_vocab(), teacher.get_vocab()
    if mine != theirs:
        odd = min(token for token in {*mine, *theirs} if mine.get(token) != theirs.get(token))
        raise ModelError(
            f"the proxy's tokenizer gives {odd!r} the id {mine.get(odd)}, the target's {theirs.get(odd)}; "
            "use the tokenizer that the proxy was saved with"
        )
    if student.special_tokens_map != teacher.special_tokens_map:
        raise ModelError(
            f"the special tokens of the proxy's tokenizer {student.special_tokens_map} are not the target's "
            f"{teacher.special_tokens_map}; use the tokenizer that the proxy was saved with"
        )
