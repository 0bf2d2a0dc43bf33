"""Which clients take part in a round."""

from collections.abc import Sequence

import torch

from fedproxy.errors import ConfigError
from fedproxy.seeding import generator


def sample_clients(clients: Sequence[str], per_round: int | str, *, seed: int, round: int) -> list[str]:  # noqa: A002
    """Return the round's clients, sorted: all of them, or ``per_round`` drawn without replacement.

    Raises:
        ConfigError: If more clients are asked for than there are.
    """
    if per_round == "all":
        return sorted(clients)
    count = int(per_round)
    if count > len(clients):
        raise ConfigError(
            f"federation.clients_per_round must be at most the {len(clients)} clients there are, got {count}"
        )
    order = torch.randperm(len(clients), generator=generator(seed, round, "sampling")).tolist()
    return sorted(sorted(clients)[i] for i in order[:count])
