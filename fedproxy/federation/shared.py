"""What rules share between server and clients beyond the state: the loop's part in it, one function per direction."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedproxy.errors import ClientError, one_line
from fedproxy.federation.checkpoint import Progress
from fedproxy.federation.client_store import ClientStore
from fedproxy.federation.frozen_weights import GROUP as FROZEN_CHANGE
from fedproxy.protocol import ClientUpdate, Tensors, nbytes
from fedproxy.strategies.aggregators import Aggregator, RoundContext
from fedproxy.strategies.aggregators.cohort import Source
from fedproxy.strategies.aggregators.survey import not_finite
from fedproxy.strategies.regularizers import Regularizer
from fedproxy.strategies.trainable.base import TrainableModel


def broadcast_extras(progress: Progress, aggregator: Aggregator, regularizer: Regularizer) -> dict[str, Tensors]:
    """Return what the next broadcast carries beside state and conflict."""
    extras: dict[str, Tensors] = {}
    if progress.shared_memory:
        extras[regularizer.name] = progress.shared_memory
    if aggregator.moves_base and progress.round:
        extras[FROZEN_CHANGE] = progress.frozen_change
    return extras


def merge_shared(
    progress: Progress, regularizer: Regularizer, updates: Sequence[ClientUpdate], clients: int
) -> dict[str, Tensor]:
    """Return the server's half of the regularizer's memory after a round.

    Args:
        progress: Before the round.
        regularizer: The clients' term.
        updates: The round's updates, in sorted client order.
        clients: All clients of the federation, in the round or not.

    Raises:
        ClientError: If an update lacks the client's part.
    """
    if not regularizer.keeps_shared_memory:
        return {}
    for update in updates:
        if regularizer.name not in update.extras:
            raise ClientError(
                f"client {update.client_id!r} must send extras[{regularizer.name!r}] for regularizer "
                f"{regularizer.name!r}, got {sorted(update.extras)}; let it run the regularizer of the job it was sent"
            )
    return regularizer.merge_shared(
        progress.shared_memory, [update.extras[regularizer.name] for update in updates], clients
    )


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


def own_tensors(state: Mapping[str, Tensor], aggregator: Aggregator) -> list[str]:
    """Return the tensors of the state that every client keeps to itself."""
    return [name for name in state if not aggregator.shares(name)]


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
    if aggregator.moves_base and progress.round:
        store.frozen.receive(model, progress.round, progress.frozen_change)
    own = {name: progress.state[name] for name in own_tensors(progress.state, aggregator)}
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
        if memory.own:
            counts.append(ClientUpdate(client, {}, memory.num_examples, memory.num_tokens))
    if not counts:
        return {}, 0
    weights = aggregator.linear_weights(counts, RoundContext(round_))
    sums, handed = {name: torch.zeros_like(tensor, dtype=torch.float32) for name, tensor in start.items()}, 0
    for update, weight in zip(counts, weights.tolist(), strict=True):
        own = store.memory.load(update.client_id, before=round_ + 1).own
        _check_own(update.client_id, own, start)
        handed += nbytes(own)
        for name, total in sums.items():
            change = (own[name] - start[name]).float()
            if not bool(change.isfinite().all()):
                raise not_finite(update.client_id, name)
            total.add_(change, alpha=weight)
    return {name: start[name] + total.to(start[name].dtype) for name, total in sums.items()}, handed
