"""One client's work in one round: start from the broadcast state, tune on its own rows, send back the change."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from fedproxy.data.batching import ExampleLoader
from fedproxy.data.tokenisation import Example
from fedproxy.errors import ClientError
from fedproxy.modules.causal_lm import CausalLMModule
from fedproxy.modules.trainer import fit, make_trainer
from fedproxy.protocol import Broadcast, ClientUpdate
from fedproxy.seeding import derive_seed, generator
from fedproxy.strategies.regularizers import Regularizer
from fedproxy.strategies.trainable.base import TrainableModel


@dataclass(frozen=True)
class Job:
    """What the server asks of every client in a round, sent as plain values in the broadcast."""

    seed: int
    lr: float
    batch_size: int
    accumulate: int
    epochs: int
    weight_decay: float
    max_grad_norm: float | None
    regularizer: Mapping[str, Any]
    """Name and options of the client-side term."""
    frozen: Sequence[str] = ()
    """Tensors of the state that rest in this round."""


class LocalClient:
    """Trains any of its clients on one resident proxy, whose adapter is swapped in place.

    Args:
        model: The proxy with what is trained attached.
        examples: Each client's tokenised rows.
        pad_id: Token that fills up short examples.
        trainer: Options of lightning.Trainer.
    """

    def __init__(
        self,
        model: TrainableModel,
        examples: Mapping[str, Sequence[Example]],
        *,
        pad_id: int,
        trainer: Mapping[str, Any],
    ) -> None:
        self.model, self.examples, self.pad_id, self.trainer = model, examples, pad_id, trainer

    def train(self, broadcast: Broadcast, client_id: str, *, deadline: float | None = None) -> ClientUpdate:
        """Tune on one client's rows from the broadcast state (Eq 8); the optimiser starts fresh.

        Raises:
            ClientError: If the client has no rows, the broadcast does not fit what it trains, or ``deadline``
                (``time.monotonic()``) passes, which is looked at after each batch.
        """
        started = time.perf_counter()
        job = Job(**broadcast.job)
        self.model.load_state(broadcast.state)
        parameters = self.model.parameters()
        trained = {name: parameter for name, parameter in parameters.items() if name not in job.frozen}
        loader = ExampleLoader(
            self.examples[client_id],
            job.batch_size,
            pad_id=self.pad_id,
            generator=generator(job.seed, broadcast.round, client_id, "batches"),
        )
        module = CausalLMModule(
            self.model.model,
            lr=job.lr,
            weight_decay=job.weight_decay,
            parameters=trained,
            regularizer=_regularizer(job.regularizer),
            anchor=broadcast.state,
            conflict=broadcast.conflict,
        )
        trainer = make_trainer(
            self.trainer,
            max_epochs=job.epochs,
            accumulate=job.accumulate,
            max_grad_norm=job.max_grad_norm,
            callbacks=[] if deadline is None else [_Deadline(deadline)],
        )
        with _resting(parameters[name] for name in job.frozen):
            fit(trainer, module, loader, seed=derive_seed(job.seed, broadcast.round, client_id, "dropout"))
        return ClientUpdate(
            client_id,
            _difference(self.model.state(), broadcast.state),
            num_examples=len(self.examples[client_id]),
            num_tokens=loader.num_tokens * job.epochs,
            train_loss=module.task_loss,
            regularizer_loss=module.regularizer_loss,
            seconds=time.perf_counter() - started,
            round=broadcast.round,
        )


class _Deadline(Callback):  # type: ignore[misc]
    """Ends a fit after the first batch that ends too late."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline

    def on_train_batch_end(self, *_: Any) -> None:
        if time.monotonic() > self.deadline:
            raise ClientError("the round's time is over; raise federation.round_timeout_s")


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


def _difference(new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.sub_(old[name]) for name, tensor in new.items()}


def _regularizer(node: Mapping[str, Any]) -> Regularizer:
    options = {key: value for key, value in node.items() if key != "name"}
    return Regularizer.by_name(node["name"])(**options)
