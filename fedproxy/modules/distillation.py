"""The module that trains a proxy to imitate the target on public text."""

from collections.abc import Mapping, Sequence

import lightning
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedproxy.errors import ConfigError, ModelError
from fedproxy.models.decoder import Decoder
from fedproxy.modules.divergence import DivergenceName, mean_divergence
from fedproxy.modules.losses import hidden_distance
from fedproxy.modules.teacher import Head, Teacher, observe
from fedproxy.modules.trainer import adamw, attention

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
