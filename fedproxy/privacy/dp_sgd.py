"""DP-SGD on what a client trains (Abadi et al. 2016, arXiv 1607.00133): Poisson samples, clipped rows, noise."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedproxy.data.batching import collate
from fedproxy.data.examples import IGNORED, Example
from fedproxy.errors import ClientError
from fedproxy.modules.answer_logits import answer_logits
from fedproxy.modules.causal_lm import CausalLMModule
from fedproxy.modules.losses import answer_nll
from fedproxy.modules.trainer import attention
from fedproxy.privacy.noise import SecretStream, noised
from fedproxy.privacy.row_gradients import RowGradients


@dataclass(frozen=True)
class PrivateTraining:
    """How a client's rows are sampled, clipped and noised."""

    clip: float
    """Largest norm of a row's gradient."""
    noise_multiplier: float
    """Standard deviation of the noise on the sum over a sample's rows, in units of the clip."""
    rate: float
    """Chance of a row to be in a step's sample, in (0, 1]."""
    steps: int
    """Steps of an epoch."""
    charged: int
    """Steps that the ledger was charged for: no other is made."""
    physical_batch: int
    """Rows whose gradients are held at once."""
    stream: SecretStream
    """Draws samples and noise."""


def sampling_of(rows: int, batch_size: int) -> tuple[float, int]:
    """Return the chance of a row to be in a sample, and the samples of an epoch: each row comes once on average."""
    steps = max(1, -(-rows // batch_size))
    return min(1.0, batch_size / rows), steps


def steps_of(epoch: int, epochs: int, most: int | None) -> int:
    """Return the steps of a round: those of ``epochs`` epochs, at most ``most``."""
    return epoch * epochs if most is None else min(epoch * epochs, most)


class PoissonLoader:
    """Endless epochs of Poisson samples, each in batches of few rows; ``last`` marks the end of a sample.

    A sample without rows is one batch of none: a step is made of noise alone.

    Args:
        examples: All examples of a client.
        training: How they are drawn.
        pad_id: Token that fills up short examples.

    Raises:
        ClientError: If there are no examples.
    """

    def __init__(self, examples: Sequence[Example], training: PrivateTraining, *, pad_id: int) -> None:
        if not examples:
            raise ClientError("a client has no training rows; give it rows or leave it out of the federation")
        self.examples, self.training, self.pad_id = examples, training, pad_id

    def tokens_of(self, batches: int) -> int:
        """Return the target tokens of an epoch on average: those of all rows. What was drawn stays with the client."""
        return sum(example.target_length for example in self.examples)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield batches of at most ``physical_batch`` rows; ``last`` is a bool tensor, and a sample may be empty."""
        for _ in range(self.training.steps):
            chosen = self.training.stream.chosen(len(self.examples), self.training.rate).tolist()
            chosen.sort(key=lambda index: len(self.examples[index].input_ids))
            size = self.training.physical_batch
            parts = [chosen[start : start + size] for start in range(0, len(chosen), size)] or [[]]
            for part in parts:
                batch = collate([self.examples[index] for index in part], self.pad_id) if part else _nothing()
                yield {**batch, "last": torch.tensor(part is parts[-1])}


class PrivateLMModule(CausalLMModule):
    """Tunes on rows that each pull by a bounded gradient, under noise.

    The gradient of a step is (sum of clipped gradients + noise) / expected rows of a sample. Choice: the loss of a row
    is the mean over its own answer tokens, since a mean over a batch's tokens would tie rows together. The
    regularizer's gradient is added behind the noise: it depends on parameters and broadcast alone.

    Args:
        model: The proxy, with adapters attached.
        training: How rows are clipped and noised.
        rows: The client's rows.
        options: Further arguments of :class:`CausalLMModule`.
    """

    def __init__(self, model: Any, training: PrivateTraining, rows: int, **options: Any) -> None:
        super().__init__(model, **options)
        self.automatic_optimization = False
        self.training_, self._expected = training, training.rate * rows
        self._gradients = RowGradients(model, self.tuned)
        self._sums: dict[str, Tensor] = {}
        self._made = 0

    @property
    def physical_batch(self) -> int:
        """Rows that go through the model at once."""
        return self.training_.physical_batch if self._gradients.by_layer else 1

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Add a batch's clipped rows, step at the end of a sample, and return the loss of the last rows."""
        rows, loss = len(batch["input_ids"]), torch.zeros(())
        for start in range(0, rows, self.physical_batch):
            loss = self._add({name: t[start : start + self.physical_batch] for name, t in batch.items() if t.ndim})
        if bool(batch["last"]):
            self._step()
        return loss

    def _add(self, batch: Mapping[str, Tensor]) -> Tensor:
        rows = len(batch["input_ids"])
        with self._gradients.of(rows):
            with attention(batch["input_ids"]):
                logits, targets = answer_logits(self.model, dict(batch))
            losses = row_losses(answer_nll(logits, targets), batch["labels"])
            self.manual_backward(losses.sum())
        for name, total in self._gradients.clipped_sum(self.training_.clip).items():
            self._sums[name] = self._sums[name].add_(total) if name in self._sums else total
        loss = losses.detach().mean()
        if loss.isfinite():
            self.step_loss.update(loss)
        return loss

    def _step(self) -> None:
        if self._made >= self.training_.charged:
            raise ClientError(
                f"a step more than the {self.training_.charged} that the privacy ledger was charged for is not made"
            )
        self._made += 1
        sums = self._sums or {name: torch.zeros_like(own, dtype=torch.float32) for name, own in self.tuned.items()}
        self._sums = {}
        scale = self.training_.noise_multiplier * self.training_.clip if self.training_.noise_multiplier else 0.0
        for name, total in noised(sums, scale, self.training_.stream).items():
            own = self.tuned[name]
            own.grad = total.div_(self._expected).to(own.dtype)
        optimizer: Any = self.optimizers()
        optimizer.step()
        optimizer.zero_grad()
        schedule: Any = self.lr_schedulers()
        if schedule is not None:
            schedule.step()

    def on_train_epoch_end(self) -> None:
        """Log nothing: what the model answers stays with the client."""


def row_losses(nll: Tensor, labels: Tensor) -> Tensor:
    """Return each row's mean loss over its answer tokens, (rows); a row without any has 0.

    Args:
        nll: Of all answer tokens, in row-major order of the batch.
        labels: int64 (rows, length), -100 where no loss is taken.
    """
    counts = (labels[:, 1:] != IGNORED).sum(dim=1)
    row = torch.repeat_interleave(torch.arange(len(labels), device=nll.device), counts)
    return nll.new_zeros(len(labels)).index_add(0, row, nll) / counts.clamp_min(1)


def _nothing() -> dict[str, Tensor]:
    return {name: torch.zeros((0, 1), dtype=torch.long) for name in ("input_ids", "attention_mask", "labels")}
