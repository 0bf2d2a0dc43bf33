"""Which clients take part in a round."""

from collections.abc import Mapping, Sequence

import torch

from fedproxy.errors import ConfigError
from fedproxy.seeding import generator


def sample_clients(
    clients: Sequence[str],
    per_round: int | str,
    *,
    seed: int,
    round: int,  # noqa: A002
    rows: Mapping[str, int] | None = None,
) -> list[str]:
    """Return the round's clients, sorted: all of them, or ``per_round`` drawn without replacement.

    Args:
        clients: All there are.
        per_round: How many, or ``all``.
        seed: Seed of the run.
        round: Round number; every round has its own draw.
        rows: Where given, each draw takes one of the clients that are left with a chance in proportion to its rows;
            else all have the same chance.

    Raises:
        ConfigError: If more clients are asked for than there are.
    """
    names = sorted(clients)
    if per_round == "all":
        return names
    count = int(per_round)
    if count > len(names):
        raise ConfigError(
            f"federation.clients_per_round must be at most the {len(names)} clients there are, got {count}"
        )
    draw = generator(seed, round, "sampling")
    if rows is None:
        order = torch.randperm(len(names), generator=draw).tolist()
    else:
        # The first ringings of clocks whose rates are the rows come in the order of such draws.
        waits = torch.empty(len(names), dtype=torch.float64).exponential_(generator=draw)
        order = (waits / torch.tensor([float(rows[name]) for name in names])).argsort().tolist()
    return sorted(names[i] for i in order[:count])
