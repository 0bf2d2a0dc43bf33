"""After the last round: a model brought to the state that is fused, personal tensors handed in for it."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedproxy.errors import ClientError, one_line
from fedproxy.federation.client.store import ClientStore
from fedproxy.federation.server.checkpoint import Progress
from fedproxy.protocol import ClientUpdate, Tensors, nbytes
from fedproxy.strategies.aggregators import Aggregator, RoundContext
from fedproxy.strategies.aggregators.cohort import Source
from fedproxy.strategies.aggregators.survey import not_finite
from fedproxy.strategies.trainable.base import TrainableModel


def _check_own(client: str, own: Tensors, start: Tensors) -> None:
    """Refuse tensors of a client's own that do not fit the state.

    Raises:
        ClientError: Naming the first that is missing, unknown or of another form.
    """
    for name in sorted(set(own) | set(start)):
        if name not in own or name not in start or Source.of(own, name).shape != tuple(start[name].shape):
            raise ClientError(
                f"client {client!r} hands in other tensors of its own than the state has "
                f"({one_line(repr(name), 100)}); start again with overwrite=true"
            )


def assemble(
    model: TrainableModel, progress: Progress, aggregator: Aggregator, store: ClientStore, clients: Sequence[str]
) -> int:
    """Bring a model to the state of ``progress``: shared tensors, the frozen weights, and the mean of clients' own.

    Clients hand in the tensors that they kept to themselves once, for this; those that were in no round have none.

    Returns:
        Bytes that clients handed in.

    Raises:
        CheckpointError: If a file that the state needs is damaged or missing.
    """
    if "base_change" in aggregator.parts and progress.round:
        store.frozen.receive(model, progress.round, progress.remembered("base_change"))
    own = {name: tensor for name, tensor in progress.state.items() if not aggregator.shares(name)}
    means, handed = _mean_of_own(own, aggregator, store, sorted(clients), progress.round) if own else ({}, 0)
    model.load_state({**progress.state, **means})
    return handed


def _mean_of_own(
    start: Mapping[str, Tensor], aggregator: Aggregator, store: ClientStore, clients: Sequence[str], round_: int
) -> tuple[dict[str, Tensor], int]:
    """Return the clients' own tensors merged by a linear rule, and their bytes; one client's are held at a time.

    Raises:
        CheckpointError: If a file is damaged.
        ClientError: If a client's tensors do not fit the state or are not finite.
    """
    counts = []
    for client in clients:
        memory = store.memory.load(client, before=round_ + 1)
        if "personal" in memory.parts:
            counts.append(ClientUpdate(client, {}, memory.num_examples, memory.num_tokens))
    if not counts:
        return {}, 0
    weights = aggregator.linear_weights(counts, RoundContext(round_))
    sums, handed = {name: torch.zeros_like(tensor, dtype=torch.float32) for name, tensor in start.items()}, 0
    for update, weight in zip(counts, weights.tolist(), strict=True):
        own = store.memory.load(update.client_id, before=round_ + 1).parts["personal"]
        _check_own(update.client_id, own, start)
        handed += nbytes(own)
        for name, total in sums.items():
            change = (own[name] - start[name]).float()
            if not bool(change.isfinite().all()):
                raise not_finite(update.client_id, name)
            total.add_(change, alpha=weight)
    return {name: start[name] + total.to(start[name].dtype) for name, total in sums.items()}, handed
