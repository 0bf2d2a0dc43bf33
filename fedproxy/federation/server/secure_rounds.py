"""Rounds of which the server learns the sum alone: keys first, then masked updates, again without who is missing."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch

from fedproxy.errors import ClientError, one_line
from fedproxy.federation.server.admission import Form, Vault, admit
from fedproxy.federation.server.expected import Expected
from fedproxy.messages import Dropped, Keys, Sites, UpdateFile
from fedproxy.privacy.keys import PUBLIC_BYTES, SHARE_BYTES, Occasion, verify
from fedproxy.protocol import Broadcast, ClientUpdate
from fedproxy.strategies.aggregators import Aggregator, RoundContext
from fedproxy.strategies.functional.voting import Sums
from fedproxy.strategies.round_parts import RoundPart
from fedproxy.strategies.round_parts.secure_sum import SecureSum
from fedproxy.strategies.round_parts.sign_sums import SignSums

LEAST = 2
"""Clients of a sum that hides anything."""


def key_shares(
    sites: Sites,
    clients: Sequence[str],
    occasion: Occasion,
    registered: Mapping[str, bytes],
    folder: Path | None = None,
) -> tuple[dict[str, bytes], dict[str, str]]:
    """Ask a round's clients for their signed key shares.

    Args:
        sites: The clients.
        clients: Whom to ask.
        occasion: The sum that they are for.
        registered: The clients' registered keys, as far as the server knows them.
        folder: Folder of the server alone, for its copies of what comes as files.

    Returns:
        The shares, and why each client without one is left out. Clients verify shares, whatever the server found; here
        a share that they would refuse costs its own client the round, and nobody else.
    """
    share = {"share": torch.empty(SHARE_BYTES, dtype=torch.uint8)}
    form = Form.of(Broadcast(occasion.round, share), Expected())
    shares: dict[str, bytes] = {}
    missing: dict[str, str] = {}
    messages = {client: Keys(occasion.run, occasion.round, occasion.attempt) for client in clients}
    with closing(sites.ask(messages)) as answers:
        for answer in answers:
            client = answer.client_id
            if not isinstance(answer, ClientUpdate | UpdateFile):
                missing[client] = answer.reason if isinstance(answer, Dropped) else "it sent no key share"
                continue
            try:
                sent = admit(answer, form, Vault(folder)).delta["share"].numpy().tobytes()
                if client in registered:
                    verify({client: sent}, registered, occasion)
            except ClientError as error:
                missing[client] = f"its key share cannot be used: {one_line(error, 240)}"
                continue
            shares[client] = sent
    for client, other in _alike(shares):
        missing[client] = f"it has the key share of client {other!r}; both must make their own"
    return {client: share for client, share in shares.items() if client not in missing}, missing


def _alike(shares: Mapping[str, bytes]) -> Iterator[tuple[str, str]]:
    """Yield the clients whose share another one has too, with that one."""
    by_public: dict[bytes, list[str]] = {}
    for client in sorted(shares):
        by_public.setdefault(shares[client][:PUBLIC_BYTES], []).append(client)
    for first, *others in by_public.values():
        yield from ((client, first if client != first else others[0]) for client in (first, *others) if others)


def sum_of(updates: Sequence[ClientUpdate], secure: SecureSum, aggregator: Aggregator, seed: int) -> ClientUpdate:
    """Return masked updates as one that the rule weighs as it would have weighed them all.

    Where the rule merges sums, its number of examples is that of the clients.
    """
    one, context = secure.summed(updates), RoundContext(updates[0].round or 0, seed)
    if aggregator.sum_part:
        return replace(one, num_examples=len(updates))
    weights = [float(aggregator.linear_weights(group, context).sum()) for group in (updates, [one])]
    scale = weights[0] / weights[1]
    return one if scale == 1 else replace(one, delta={name: one.delta[name] * scale for name in one.delta})


def sums_in(total: ClientUpdate, parts: Iterable[RoundPart]) -> Mapping[str, Sums]:
    """Return the sums over clients that a rule merges, which one of the round's parts sent."""
    (part,) = (part for part in parts if isinstance(part, SignSums))
    return part.sums(total)


def left(clients: Sequence[str], missing: dict[str, str], least: int | None, round_: int) -> list[str]:
    """Return the clients that a round is repeated with.

    Raises:
        ClientError: If that are too few.
    """
    names = [client for client in clients if client not in missing]
    wanted = max(LEAST, len(clients) if least is None else least)
    if len(names) < wanted:
        client = sorted(missing)[-1]
        raise ClientError(
            f"client {client!r} failed in round {round_}: {missing[client]}; that leaves {len(names)} of "
            f"{len(clients)} clients for a secure sum, which asks for {wanted}; fix the client or lower "
            "federation.min_clients, then resume=auto"
        )
    return names
