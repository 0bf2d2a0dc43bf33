"""What rules share between server and clients beyond the state: the loop's part in it, one function per direction."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from fedproxy.errors import ClientError
from fedproxy.federation.checkpoint import Progress
from fedproxy.federation.client_store import ClientStore
from fedproxy.federation.frozen_weights import GROUP as FROZEN_CHANGE
from fedproxy.protocol import ClientUpdate, Tensors
from fedproxy.strategies.aggregators import Aggregator, RoundContext
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
    state, own = dict(progress.state), own_tensors(progress.state, aggregator)
    handed = []
    for client in sorted(clients) if own else ():
        memory = store.memory.load(client, before=progress.round + 1)
        if memory.own:
            kept = {name: memory.own[name] - state[name] for name in own}
            handed.append(ClientUpdate(client, kept, memory.num_examples, memory.num_tokens))
    if handed:
        merged = aggregator.aggregate(handed, None, RoundContext(progress.round), figures=False)
        state |= {name: state[name] + merged.delta[name] for name in own}
    model.load_state(state)
    return sum(update.bytes for update in handed)
