"""One client's training in one round: from the state it starts with, on its own rows, to the change of it."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from fedproxy.errors import ClientError
from fedproxy.federation.client.base import listener
from fedproxy.models.sharding import is_sharded
from fedproxy.modules.callbacks import Deadline, Regularize, Tell
from fedproxy.modules.causal_lm import CausalLMModule
from fedproxy.modules.datamodule import ExampleDataModule
from fedproxy.modules.optimizers import Optimizer
from fedproxy.modules.schedules import Schedule
from fedproxy.modules.trainer import fitting, make_trainer
from fedproxy.privacy.dp_sgd import PoissonLoader, PrivateLMModule
from fedproxy.processes import rank_and_size
from fedproxy.protocol import Broadcast, ClientUpdate
from fedproxy.seeding import ClientSeeds
from fedproxy.strategies.regularizers import Regularizer
from fedproxy.strategies.round_parts import ClientRound
from fedproxy.strategies.trainable.base import TrainableModel


@dataclass(frozen=True)
class Job:
    """What the server asks of every client in a round, sent as plain values in the broadcast."""

    lr: float
    batch_size: int
    accumulate: int
    epochs: int
    weight_decay: float
    max_grad_norm: float | None
    regularizer: Mapping[str, Any]
    """Name and options of the client-side term."""
    schedule: Mapping[str, Any] = field(default_factory=lambda: {"name": "constant"})
    """Name and options of the learning rate's schedule."""
    optimizer: Mapping[str, Any] = field(default_factory=lambda: {"name": "adamw"})
    """Name and options of the optimiser."""
    rounds: int = 1
    """Rounds of the run, over which a schedule may go."""
    max_steps: int | None = None
    """Most optimiser steps."""
    packing: bool = False
    """Put rows of a batch side by side; the server has checked that its model keeps them apart."""
    gradient_checkpointing: bool = False
    """Run blocks again in the backward pass instead of keeping their activations."""
    frozen: Sequence[str] = ()
    """Tensors of the state that rest in this round."""
    parts: Sequence[Mapping[str, Any]] = ()
    """Names and options of the parts that ride with the round, in the order of the chain."""

    def steps(self, batches: int) -> int:
        """Return a round's optimiser steps, given the batches of an epoch."""
        steps = self.epochs * math.ceil(batches / self.accumulate)
        return steps if self.max_steps is None else min(steps, self.max_steps)


def tune(
    task: ClientRound,
    job: Job,
    seeds: ClientSeeds,
    options: Mapping[str, Any],
    *,
    deadline: float | None = None,
    logs: Path | None = None,
) -> ClientUpdate:
    """Tune the task's model on its rows from its state (Eq 8), and return the change.

    Args:
        task: The client's work, as its parts prepared it; steps and device are noted in it.
        job: What the server asks.
        seeds: Of this client's draws.
        options: Options of lightning.Trainer.
        deadline: ``time.monotonic()`` after which to give up, looked at after each batch.
        logs: Folder of what Lightning's loggers and profilers write.

    Raises:
        ClientError: If the state does not fit what is trained, or the deadline passes.
    """
    model = task.model
    model.load_state(task.state)
    data = _data(task, job, seeds)
    steps = job.steps(len(data.sampler)) if isinstance(data, ExampleDataModule) else data.training.charged
    rate = Schedule.made(job.schedule).in_round(task.broadcast.round, rounds=job.rounds, steps=steps, lr=job.lr)
    module = _module(task, job, rate)
    term = Regularize(Regularizer.made(job.regularizer), task.state, task.conflict, task.pull)
    private = task.training is not None  # clips each row, and steps by itself
    trainer = make_trainer(
        options,
        max_epochs=job.epochs,
        max_steps=-1 if job.max_steps is None else job.max_steps,
        accumulate=1 if private else job.accumulate,
        max_grad_norm=None if private else job.max_grad_norm,
        callbacks=_callbacks(term, deadline, steps),
        root=logs,
    )
    if is_sharded(module.tuned) or getattr(model.model, "is_quantized", False):
        module.cpu = lambda: module  # Lightning moves modules there after a fit; these weights stay where they are
    parameters, seed = model.parameters(), seeds.dropout[rank_and_size()[0]]
    with (
        _resting(parameters[name] for name in job.frozen),
        _recomputing(model, job.gradient_checkpointing),
        fitting(trainer, module, seed=seed),
    ):
        trainer.fit(module, data)
    task.steps, task.device = trainer.global_step, trainer.strategy.root_device
    task.lr = job.lr * (sum(map(rate, range(task.steps))) / task.steps or 1.0)
    return ClientUpdate(
        task.client_id,
        _difference(model.state(), task.state),
        num_examples=len(task.examples),
        num_tokens=data.tokens_of(trainer.fit_loop.epoch_loop.total_batch_idx + 1),
        train_loss=module.task_loss,
        regularizer_loss=term.mean_loss,
        round=task.broadcast.round,
    )


def _callbacks(term: Regularize, deadline: float | None, steps: int) -> list[Callback]:
    """Return what rides with a fit of so many optimiser steps."""
    late, listens = [] if deadline is None else [Deadline(deadline)], listener()
    return [term, *late, *([] if listens is None else [Tell(listens, steps)])]


def _data(task: ClientRound, job: Job, seeds: ClientSeeds) -> ExampleDataModule | PoissonLoader:
    """Return the batches of a round."""
    if task.training is not None:
        return PoissonLoader(task.examples, task.training, pad_id=task.pad_id)
    order = torch.Generator().manual_seed(seeds.batches)
    return ExampleDataModule(task.examples, job.batch_size, pad_id=task.pad_id, generator=order, packing=job.packing)


def _module(task: ClientRound, job: Job, rate: Callable[[int], float]) -> CausalLMModule:
    """Return what trains in a round."""
    options: dict[str, Any] = {
        "lr": job.lr,
        "schedule": rate,
        "optimizer": Optimizer.made(job.optimizer),
        "weight_decay": job.weight_decay,
        "parameters": {name: own for name, own in task.model.parameters().items() if name not in job.frozen},
    }
    if task.training is not None:
        return PrivateLMModule(task.model.model, task.training, len(task.examples), **options)
    return CausalLMModule(task.model.model, **options)


def client_seeds(broadcast: Broadcast) -> ClientSeeds:
    """Return the seeds of this client's draws; processes that share a batch each draw their own dropout masks.

    Raises:
        ClientError: If the server sent too few.
    """
    seeds, processes = broadcast.seeds, rank_and_size()[1]
    if seeds is None or len(seeds.dropout) < processes:
        raise ClientError(f"the broadcast brings no seeds for {processes} processes; send them with every task")
    return seeds


@contextmanager
def _resting(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    resting = list(parameters)
    for parameter in resting:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in resting:
            parameter.requires_grad_(True)


@contextmanager
def _recomputing(model: TrainableModel, wanted: bool) -> Iterator[None]:
    """Let blocks forget their activations after the forward pass, where that is wanted."""
    if not wanted:
        yield
        return
    if not model.model.supports_gradient_checkpointing:
        raise ClientError(
            f"client.gradient_checkpointing: {model.model.config.model_type} models do not have it; set it to false"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # renamed in transformers 5.23; the new name is not in 5.0
        model.model.gradient_checkpointing_enable({"use_reentrant": False})
        try:
            yield
        finally:
            model.model.gradient_checkpointing_disable()


def _difference(new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.sub_(old[name]) for name, tensor in new.items()}
