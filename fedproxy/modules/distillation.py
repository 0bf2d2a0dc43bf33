"""Distillation of the target into the proxy on public text, before any client sees the proxy."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedproxy.data.batching import ShuffledBatches
from fedproxy.errors import ConfigError, ModelError
from fedproxy.models.checkpoints import placed
from fedproxy.models.decoder import Decoder, set_weights
from fedproxy.models.layer_map import LayerMap
from fedproxy.modules.distillation_config import DistillationConfig
from fedproxy.modules.divergence import DivergenceName, mean_divergence
from fedproxy.modules.losses import hidden_distance
from fedproxy.modules.teacher import Head, Teacher, observe
from fedproxy.modules.teacher_cache import TeacherCache
from fedproxy.modules.trainer import adamw, attention, fit, make_trainer
from fedproxy.strategies.trainable.base import TrainableModel
from fedproxy.strategies.trainable.lora import Lora
from fedproxy.strategies.trainable.lora_places import ALL_LINEAR

_MAX_GRAD_NORM = 1.0
_LAST_STEPS = 10


class DistillationModule(lightning.LightningModule):  # type: ignore[misc]
    """Trains weights of the proxy so that it imitates the target on public text.

    Loss = ``kl_weight`` * the divergence of next-token distributions + ``hidden_weight`` * the mean over ``pairs``
    (own, other) of the distance between the proxy's block ``own`` and the target's block ``other``
    (:func:`hidden_distance`; FedBiOT's alignment over kept blocks). Both are means over real tokens.

    Args:
        student: The proxy, in the mode that it shall be trained in.
        teacher: The target, asked about every batch; it takes them on the student's device (:func:`placed`). Never
            part of the module's state or checkpoints.
        parameters: The student's weights that are trained; none of its output head.
        lr: Learning rate of AdamW, constant.
        pairs: Blocks whose hidden states are compared; empty for none.
        divergence: Which divergence (:mod:`fedproxy.modules.divergence`).
        temperature: Softens both distributions; the teacher's must be the same.
        kl_weight: Weight of the divergence, >= 0; 0 leaves the head out.
        hidden_weight: Weight of the hidden states' distance, >= 0.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: Teacher,
        parameters: Sequence[nn.Parameter],
        *,
        lr: float,
        pairs: Sequence[tuple[int, int]] = (),
        divergence: DivergenceName = "forward_kl",
        temperature: float = 1.0,
        kl_weight: float = 1.0,
        hidden_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.student = student
        self.tuned = list(parameters)
        self.lr, self.temperature = lr, temperature
        self.kl_weight, self.hidden_weight = kl_weight, hidden_weight
        self.divergence: DivergenceName = divergence
        self.pairs = tuple(pairs) if hidden_weight else ()
        # In tuples, Lightning does not take the teacher and the heads for parts of this module.
        self._teacher, self._head = (teacher,), (Head(student),)
        self.losses: list[Tensor] = []
        """Loss of every step so far, 0-dim, on the module's device."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of one batch of public text."""
        wanted = self._teacher[0](batch)
        with attention(batch["input_ids"]):
            got = observe(self.student, batch, [own for own, _ in self.pairs])
        loss = got["head"].new_zeros((), dtype=torch.float32)
        if self.kl_weight:
            assert wanted.distribution is not None
            kl = mean_divergence(
                got["head"],
                self._head[0],
                wanted.distribution,
                vocabulary=self._head[0].vocabulary,
                kind=self.divergence,
                temperature=self.temperature,
            )
            self.log("distillation/divergence", kl.detach())
            loss = loss + self.kl_weight * kl
        if self.pairs:
            distances = [hidden_distance(got[f"block_{own}"], wanted.blocks[other]) for own, other in self.pairs]
            hidden = torch.stack(distances).mean()
            self.log("distillation/hidden", hidden.detach())
            loss = loss + self.hidden_weight * hidden
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW without decay, with a constant learning rate."""
        return adamw(self.trainer, self.tuned, lr=self.lr, weight_decay=0.0)

    @property
    def last_loss(self) -> float:
        """Mean loss of the last ten steps."""
        return float(torch.stack(self.losses[-_LAST_STEPS:]).double().mean())


def distil(
    proxy: PreTrainedModel,
    target: PreTrainedModel,
    batches: Sequence[dict[str, Tensor]],
    *,
    settings: DistillationConfig,
    layer_map: LayerMap,
    trainer: Mapping[str, Any],
    generator: torch.Generator,
    cache: Path | None = None,
    logs: Path | None = None,
) -> float:
    """Distil the target into the proxy, in place.

    Choice: the embedding, the final norm and the head stay as they are, since the plug-in keeps the target's own.

    Args:
        proxy: The student.
        target: The teacher; left as it is but frozen. On the trainer's device for the length of the training, as a
            whole or, where it has no room there, one block at a time.
        batches: ``input_ids`` and ``attention_mask`` of public text, int64 (batch, length), padded on the right; gone
            over in a new order per epoch until the steps are done.
        settings: Steps, learning rate, losses; at least one step.
        layer_map: The map that the proxy was compressed with.
        trainer: Options of lightning.Trainer.
        generator: CPU generator of LoRA's start, the order and dropout.
        cache: Folder of the teacher's outputs, where ``settings.cache_teacher`` asks for one.
        logs: Folder of what Lightning's loggers and profilers write.

    Returns:
        Mean loss of the last ten steps.

    Raises:
        ConfigError: If ``top_k`` is more than the vocabulary.
        ModelError: If the two models do not fit each other.
        CheckpointError: If the cache cannot be written.
    """
    check_pair(proxy, target, layer_map.proxy_to_target)
    check_tokens(proxy, batches)
    if settings.train == "full":
        require_float32(proxy, "distillation.train=full", "distillation.train=lora")
    target.requires_grad_(False).eval()
    pairs = tuple(enumerate(layer_map.counterparts(len(Decoder.of(target))))) if settings.hidden_weight else ()
    kept = None
    if settings.cache_teacher and cache is not None:
        kept = TeacherCache(
            cache,
            target_sha256=layer_map.target_sha256,
            top_k=settings.top_k,
            max_bytes=int(settings.cache_gib * 2**30),
        )
    adapter = _lora(proxy, settings, generator) if settings.train == "lora" else None
    tuned = list(adapter.parameters().values()) if adapter else _block_weights(proxy)
    seed = int(torch.randint(2**62, (), generator=generator))
    runner = make_trainer(trainer, max_epochs=-1, max_steps=settings.steps, max_grad_norm=_MAX_GRAD_NORM, root=logs)
    with placed(target, runner.strategy.root_device):
        teacher = Teacher(
            target,
            sorted({other for _, other in pairs}),
            temperature=settings.temperature,
            distributions=settings.kl_weight > 0,
            cache=kept,
        )
        module = DistillationModule(
            proxy,
            teacher,
            tuned,
            lr=settings.lr,
            pairs=pairs,
            divergence=settings.divergence,
            temperature=settings.temperature,
            kl_weight=settings.kl_weight,
            hidden_weight=settings.hidden_weight,
        )
        proxy.train()
        fit(runner, module, ShuffledBatches(batches, generator), seed=seed)
    if adapter is not None:
        merged = {name: weight.to(proxy.dtype) for name, weight in adapter.merged_weights().items()}
        set_weights(adapter.detach(), merged)
    proxy.eval().requires_grad_(False)
    return module.last_loss


@torch.no_grad()
def mean_kl(student: PreTrainedModel, teacher: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]]) -> float:
    """Return KL(teacher || student) over next tokens, in nats per real token of all batches.

    Args:
        student: The proxy, say.
        teacher: The target.
        batches: ``input_ids`` and ``attention_mask``, int64 (batch, length), padded on the right.
    """
    ask, head = Teacher(teacher, ()), Head(student)
    total, tokens = 0.0, 0
    for batch in batches:
        said = ask(batch).distribution
        assert said is not None
        hidden = observe(student, batch, ())["head"]
        total += len(hidden) * float(mean_divergence(hidden, head, said, vocabulary=head.vocabulary))
        tokens += len(hidden)
    return total / tokens


def _block_weights(model: PreTrainedModel) -> list[nn.Parameter]:
    model.requires_grad_(False)
    return list(Decoder.of(model).blocks.requires_grad_(True).parameters())


def _lora(proxy: PreTrainedModel, settings: DistillationConfig, generator: torch.Generator) -> TrainableModel:
    """Attach LoRA to every linear layer of the blocks."""
    lora = Lora(r=settings.lora_r, alpha=settings.lora_alpha, modules=(ALL_LINEAR,))
    return lora.attach(proxy, generator)


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


def require_float32(model: PreTrainedModel, option: str, instead: str) -> None:
    """Check that a model's own weights can be trained.

    Args:
        model: The model.
        option: What asks for it, as ``key=value``.
        instead: What does without.

    Raises:
        ConfigError: If it is in half precision, where a step of usual size is lost in rounding.
    """
    if model.dtype != torch.float32:
        dtype = str(model.dtype).removeprefix("torch.")
        raise ConfigError(
            f"{option} trains the proxy's own weights, and in {dtype} small steps are lost; use {instead} or "
            "target.dtype=float32"
        )


def check_tokens(model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]]) -> None:
    """Check that a model knows every token of its text.

    Raises:
        ModelError: If a tokenizer of a larger vocabulary made the batches.
    """
    largest, known = (
        max(int(batch["input_ids"].max()) for batch in batches),
        model.get_input_embeddings().weight.shape[0],
    )
    if largest >= known:
        raise ModelError(
            f"the tokenizer gives the id {largest}, but the target's vocabulary has {known} entries; "
            "put the target's own tokenizer into target.path"
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
