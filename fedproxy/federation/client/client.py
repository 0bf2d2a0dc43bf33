"""One client's work in one round: start from the broadcast state, tune on its own rows, send back the change."""

import math
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from fedproxy.data.batching import ExampleLoader
from fedproxy.data.tokenisation import Example
from fedproxy.errors import ClientError
from fedproxy.federation.client.memory import Memory
from fedproxy.federation.client.store import ClientStore
from fedproxy.modules.causal_lm import CausalLMModule
from fedproxy.modules.optimizers import Optimizer
from fedproxy.modules.schedules import Schedule
from fedproxy.modules.trainer import fit, make_trainer
from fedproxy.names import file_stem
from fedproxy.processes import rank_and_size
from fedproxy.protocol import Broadcast, ClientUpdate
from fedproxy.seeding import ClientSeeds
from fedproxy.strategies.regularizers import Regularizer
from fedproxy.strategies.round_parts import ClientRound, made
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


class LocalClient:
    """Trains any of its clients on one resident proxy, whose adapter is swapped in place.

    Args:
        model: The proxy with what is trained attached.
        examples: Each client's tokenised rows.
        pad_id: Token that fills up short examples.
        trainer: Options of lightning.Trainer.
        store: Where clients keep what they remember between rounds; only rules that need it use it.
        logs: Folder of what Lightning's loggers and profilers write, below it one per client and round.
    """

    def __init__(
        self,
        model: TrainableModel,
        examples: Mapping[str, Sequence[Example]],
        *,
        pad_id: int,
        trainer: Mapping[str, Any],
        store: ClientStore,
        logs: Path | None = None,
    ) -> None:
        self.model, self.examples, self.pad_id, self.trainer = model, examples, pad_id, trainer
        self.store, self.logs = store, logs
        self.initial = model.state()

    def train(self, broadcast: Broadcast, client_id: str, *, deadline: float | None = None) -> ClientUpdate:
        """Tune on one client's rows from the broadcast state (Eq 8); the optimiser starts fresh.

        Raises:
            ClientError: If the client has no rows, the broadcast does not fit what it trains or lacks this client's
                seeds, or ``deadline``
                (``time.monotonic()``) passes, which is looked at after each batch.
        """
        started = time.perf_counter()
        job, seeds = Job(**broadcast.job), _seeds(broadcast)
        parts, task = [made(part) for part in job.parts], self._task(broadcast, client_id, job)
        for part in reversed(parts):
            part.receive(task)
        self.model.load_state(task.state)
        parameters = self.model.parameters()
        loader = ExampleLoader(
            task.examples,
            job.batch_size,
            pad_id=self.pad_id,
            generator=torch.Generator().manual_seed(seeds.batches),
            packing=job.packing,
        )
        steps = job.steps(len(loader))
        rate = Schedule.made(job.schedule).in_round(broadcast.round, rounds=job.rounds, steps=steps, lr=job.lr)
        module = CausalLMModule(
            self.model.model,
            lr=job.lr,
            schedule=rate,
            optimizer=Optimizer.made(job.optimizer),
            weight_decay=job.weight_decay,
            parameters={name: parameter for name, parameter in parameters.items() if name not in job.frozen},
            regularizer=Regularizer.made(job.regularizer),
            anchor=task.state,
            conflict=task.conflict,
            pull=task.pull,
        )
        trainer = make_trainer(
            self.trainer,
            max_epochs=job.epochs,
            max_steps=-1 if job.max_steps is None else job.max_steps,
            accumulate=job.accumulate,
            max_grad_norm=job.max_grad_norm,
            callbacks=[] if deadline is None else [_Deadline(deadline)],
            root=self.logs and self.logs / file_stem(client_id) / f"round_{broadcast.round:04d}",
        )
        with _resting(parameters[name] for name in job.frozen), _recomputing(self.model, job.gradient_checkpointing):
            fit(trainer, module, loader, seed=seeds.dropout[rank_and_size()[0]])
        task.steps, task.device = trainer.global_step, trainer.strategy.root_device
        task.lr = job.lr * (sum(map(rate, range(task.steps))) / task.steps or 1.0)
        update = ClientUpdate(
            client_id,
            _difference(self.model.state(), task.state),
            num_examples=len(task.examples),
            num_tokens=sum(loader.tokens[: trainer.fit_loop.epoch_loop.total_batch_idx + 1]),
            train_loss=module.task_loss,
            regularizer_loss=module.regularizer_loss,
            round=broadcast.round,
        )
        for part in parts:
            update = part.reply(task, update)
        if task.kept and task.writes:
            memory = Memory(task.kept, update.num_examples, update.num_tokens)
            self.store.memory.save(client_id, broadcast.round, memory)
        return replace(update, seconds=time.perf_counter() - started)

    def _task(self, broadcast: Broadcast, client_id: str, job: Job) -> ClientRound:
        return ClientRound(
            client_id,
            broadcast,
            self.model,
            self.initial,
            state=dict(broadcast.state),
            memory=self.store.memory.load(client_id, before=broadcast.round).parts,
            examples=self.examples[client_id],
            pad_id=self.pad_id,
            base=self.store.frozen,
            device=torch.device("cpu"),
            lr=job.lr,
            seed=_seeds(broadcast).parts,
            writes=rank_and_size()[0] == 0,
        )


class _Deadline(Callback):  # type: ignore[misc]
    """Ends a fit after the first batch that ends too late."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline

    def on_train_batch_end(self, *_: Any) -> None:
        if time.monotonic() > self.deadline:
            raise ClientError("the round's time is over; raise federation.round_timeout_s")


def _seeds(broadcast: Broadcast) -> ClientSeeds:
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
