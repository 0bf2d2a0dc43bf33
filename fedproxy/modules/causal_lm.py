"""The module that tunes a causal language model on answer tokens, for clients and for notebooks."""

from collections.abc import Callable, Mapping

import lightning
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from fedproxy.errors import ClientError
from fedproxy.modules.answer_logits import answer_logits
from fedproxy.modules.losses import answer_nll
from fedproxy.modules.metrics import AnswerAccuracy, AnswerPerplexity, step_mean
from fedproxy.modules.optimizers import AdamW, Optimizer
from fedproxy.modules.trainer import attention


class CausalLMModule(lightning.LightningModule):  # type: ignore[misc]
    """Tunes the trainable parameters of a causal language model on answer tokens (FedProxy Eq 8).

    The loss of a step is the mean negative log-likelihood of the batch's answer tokens, in nats; what a regularizer
    adds is a callback's work. A batch has ``input_ids``, ``attention_mask`` and ``labels``, int64 (batch, length), as
    transformers has them: labels are -100 except at answer tokens, and not shifted; several rows in one sequence have
    ``position_ids`` in place of the mask. Where processes share a batch, ``share`` is a process's part of the answer
    tokens, times the number of processes. Any ``lightning.Trainer`` fits the module.

    Args:
        model: The model, with adapters attached.
        lr: Learning rate, > 0.
        schedule: Gives the part of ``lr`` for each optimiser step of the fit, counted from 0; None is all of it.
        optimizer: What steps the parameters; AdamW by default.
        weight_decay: Weight decay, >= 0.
        parameters: Trainable parameters by name; the model's own trainable parameters by default.

    Raises:
        ClientError: If nothing is trainable.
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
    ) -> None:
        super().__init__()
        own = model.named_parameters() if parameters is None else parameters.items()
        self.tuned = {name: parameter for name, parameter in own if parameter.requires_grad}
        if not self.tuned:
            raise ClientError("the proxy has no trainable parameter; choose trainable.name=lora")
        self.model, self.lr, self.weight_decay = model, lr, weight_decay
        self.schedule, self.optimizer = schedule or (lambda step: 1.0), optimizer or AdamW()
        self.step_loss = step_mean()
        self.train_accuracy, self.train_perplexity = AnswerAccuracy(), AnswerPerplexity()
        self.val_accuracy, self.val_perplexity = AnswerAccuracy(), AnswerPerplexity()
        self.task_loss = float("nan")
        """Mean loss over all batches of the latest fit, nats per answer token; NaN before a fit has ended."""

    def on_train_start(self) -> None:
        """Switch dropout on."""
        self.train()
        self.step_loss.reset()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        with attention(batch["input_ids"]):
            logits, targets = answer_logits(self.model, batch)
        nll, share = answer_nll(logits, targets), batch.get("share", 1.0)
        loss = nll.mean() * share
        if share > 0:
            self.train_accuracy.update(logits, targets)
            self.train_perplexity.update(nll)
        self.step_loss.update(loss.detach())
        self.log("train/task_loss", loss.detach())
        return loss

    def on_train_epoch_end(self) -> None:
        """Log the epoch's metrics: in each step that would cost more than measuring them."""
        self.log_dict({"train/accuracy": self.train_accuracy, "train/perplexity": self.train_perplexity})

    def on_train_end(self) -> None:
        """Leave the model ready to be evaluated."""
        self.eval()
        self.task_loss = float(self.step_loss.compute()) if self.step_loss.update_called else float("nan")

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Measure one batch."""
        logits, targets = answer_logits(self.model, batch)
        self.val_accuracy.update(logits, targets)
        self.val_perplexity.update(answer_nll(logits, targets))
        self.log_dict({"val/accuracy": self.val_accuracy, "val/perplexity": self.val_perplexity})

    def configure_optimizers(self) -> dict[str, object]:
        """Return the optimiser and what sets its rate before each step."""
        tuned, options = list(self.tuned.values()), {"lr": self.lr, "weight_decay": self.weight_decay}
        optimizer = self.optimizer.make(self.trainer, tuned, **options)
        scheduler = LambdaLR(optimizer, self.schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
