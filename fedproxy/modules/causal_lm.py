"""A client's training: task loss on answer tokens plus a regularizer against the round's broadcast."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import lightning
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from fedproxy.errors import ClientError, ConfigError
from fedproxy.models.sharding import is_sharded, local_parts, part_like
from fedproxy.modules.answer_logits import answer_logits
from fedproxy.modules.losses import answer_nll
from fedproxy.modules.metrics import AnswerAccuracy, AnswerPerplexity
from fedproxy.modules.optimizers import AdamW, Optimizer
from fedproxy.modules.trainer import attention
from fedproxy.processes import rank_and_size

if TYPE_CHECKING:
    from fedproxy.strategies.regularizers import Regularizer


class CausalLMModule(lightning.LightningModule):  # type: ignore[misc]
    """Tunes the trainable parameters of a causal language model on answer tokens (PAPER Eq 8).

    The loss of a step is the mean negative log-likelihood per answer token of the batch, in nats, plus
    ``regularizer.loss(parameters, anchor, conflict)``, whose gradient is added directly where the strategy allows.
    The learning rate is constant without a schedule.

    Args:
        model: The proxy, with adapters attached.
        lr: Learning rate, > 0.
        schedule: Gives the part of ``lr`` for each optimiser step of the fit, counted from 0; None is all of it.
        optimizer: What steps the parameters; AdamW by default.
        weight_decay: Weight decay, >= 0.
        parameters: Trainable parameters by state name, as a ``TrainableModel`` gives them; the model's own
            trainable parameters by default.
        regularizer: Client-side term, or None.
        anchor: The round's broadcast state phi^t, by state name.
        conflict: Per-coordinate conflict C of the previous round (Eq 7), or None in the first.
        pull: The regularizer's constant gradient of this round (:meth:`Regularizer.pull`), or None.

    Raises:
        ConfigError: If ``lr`` or ``weight_decay`` is out of range.
        ClientError: If nothing is trainable, or the anchor lacks a trainable parameter.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        lr: float,
        schedule: Callable[[int], float] | None = None,
        optimizer: Optimizer | None = None,
        weight_decay: float = 0.0,
        parameters: Mapping[str, nn.Parameter] | None = None,
        regularizer: "Regularizer | None" = None,
        anchor: Mapping[str, Tensor] | None = None,
        conflict: Mapping[str, Tensor] | None = None,
        pull: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        if not lr > 0:
            raise ConfigError(f"client.lr must be > 0, got {lr}")
        if not weight_decay >= 0:
            raise ConfigError(f"client.weight_decay must be >= 0, got {weight_decay}")
        self.model = model
        self.lr, self.weight_decay = lr, weight_decay
        self.schedule, self.optimizer = schedule, optimizer or AdamW()
        own = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
        self.tuned = dict(own if parameters is None else parameters)
        if not self.tuned:
            raise ClientError("the proxy has no trainable parameter; choose trainable.name=lora")
        missing = sorted(set(self.tuned) - set(anchor)) if regularizer is not None and anchor is not None else []
        if missing:
            raise ClientError(f"the broadcast state lacks {missing[0]}, which this client trains; send all of it")
        self.regularizer, self.anchor, self.conflict, self.pull = regularizer, anchor, conflict, pull
        self.train_accuracy, self.train_perplexity = AnswerAccuracy(), AnswerPerplexity()
        self.val_accuracy, self.val_perplexity = AnswerAccuracy(), AnswerPerplexity()
        self._adds_gradient = False
        self._task_losses: list[Tensor] = []
        self._penalties: list[Tensor] = []
        self._task_sum, self._penalty_sum = (torch.zeros(2, dtype=torch.float64) for _ in range(2))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of one batch and note its two terms."""
        with attention(batch["input_ids"]):
            logits, targets = answer_logits(self.model, batch)
        nll = answer_nll(logits, targets)
        # A part of a batch that several processes share counts by its tokens (ExampleLoader).
        share = batch.get("share")
        task = nll.mean() if share is None else nll.mean() * share
        if share is None or share > 0:
            self.train_accuracy.update(logits, targets)
            self.train_perplexity.update(nll)
        self.log("train/task_loss", task.detach())
        self._task_losses.append(task.detach())
        if self.regularizer is None or self.anchor is None or self._adds_gradient:
            return task
        penalty = self.regularizer.loss(self.tuned, self.anchor, self.conflict, self.pull)
        self._note_penalty(penalty.detach())
        return task + penalty

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Add the regularizer's gradient, once per step and before the gradients are clipped."""
        if self.regularizer is not None and self.anchor is not None and self._adds_gradient:
            parts, processes = local_parts(self.tuned), rank_and_size()[1] if is_sharded(self.tuned) else 1
            penalty = self.regularizer.add_gradient(parts, self.anchor, self.conflict, self.pull)
            # Of sharded parameters this is the term of one part: the mean over processes is then the whole term.
            self._note_penalty(penalty * processes if processes > 1 else penalty)

    def on_train_start(self) -> None:
        """Switch dropout on, and bring what the regularizer reads to the parameters' device, once."""
        self.train()
        if self.regularizer is not None:
            given = (self.anchor, self.conflict, self.pull)
            self.anchor, self.conflict, self.pull = (self._placed(tensors) for tensors in given)
            # Strategies that shard parameters own the gradients; there the term goes through the loss.
            self._adds_gradient = isinstance(self.trainer.strategy, SingleDeviceStrategy | DDPStrategy)

    def on_train_epoch_end(self) -> None:
        """Add up the epoch's losses in one transfer and log the epoch's metrics."""
        # One transfer per epoch: reading each step's loss would make the device wait every step.
        self._task_sum += self._over_processes(_drain(self._task_losses))
        self._penalty_sum += self._over_processes(_drain(self._penalties))
        self.log("train/accuracy", self.train_accuracy)
        self.log("train/perplexity", self.train_perplexity)

    def on_train_end(self) -> None:
        """Leave the model ready to be evaluated, and let go of the broadcast."""
        self.eval()
        self.anchor = self.conflict = self.pull = None

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Measure one batch."""
        logits, targets = answer_logits(self.model, batch)
        self.val_accuracy.update(logits, targets)
        self.val_perplexity.update(answer_nll(logits, targets))

    def on_validation_epoch_end(self) -> None:
        """Log the epoch's metrics."""
        self.log("val/accuracy", self.val_accuracy)
        self.log("val/perplexity", self.val_perplexity)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimiser and, where there is a schedule, what sets its rate before each step."""
        tuned = list(self.tuned.values())
        optimizer = self.optimizer.make(self.trainer, tuned, lr=self.lr, weight_decay=self.weight_decay)
        if self.schedule is None:
            return optimizer
        scheduler = LambdaLR(optimizer, self.schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def cpu(self) -> "CausalLMModule":
        """Move to the CPU, as Lightning asks after a fit; sharded and quantised weights stay where they were made."""
        stays = is_sharded(self.tuned) or getattr(self.model, "is_quantized", False)
        return self if stays else super().cpu()

    @property
    def task_loss(self) -> float:
        """Mean task loss over all steps of the fit, nats per answer token; NaN before the first epoch ended."""
        return _mean(self._task_sum)

    @property
    def regularizer_loss(self) -> float:
        """Mean regularizer loss over all steps of the fit; zero without a regularizer."""
        return _mean(self._penalty_sum) if self._penalty_sum[1] else 0.0

    def _note_penalty(self, penalty: Tensor) -> None:
        self.log("train/regularizer_loss", penalty)
        self._penalties.append(penalty)

    def _over_processes(self, total: Tensor) -> Tensor:
        """Return the mean over the processes that train together; what each adds up is its share of a batch's loss."""
        if self.trainer.world_size == 1:
            return total
        mean: Tensor = self.trainer.strategy.reduce(total.to(self.device), reduce_op="mean")
        return mean.cpu()

    def _placed(self, tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
        if tensors is None:
            return None
        return {name: part_like(tensors[name], own) for name, own in self.tuned.items()}


def _drain(losses: list[Tensor]) -> Tensor:
    """Empty a list of 0-dim losses and return their sum and count, float64 (2)."""
    if not losses:
        return torch.zeros(2, dtype=torch.float64)
    values = torch.stack([loss.to(losses[0].device) for loss in losses]).cpu().double()
    losses.clear()
    return torch.stack((values.sum(), torch.tensor(float(len(values)), dtype=torch.float64)))


def _mean(total: Tensor) -> float:
    return float(total[0] / total[1])
