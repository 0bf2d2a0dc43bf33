"""Rounds of which the server learns the sum alone: keys first, then masked updates, again without who is missing."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import torch

from fedproxy.errors import ClientError, one_line
from fedproxy.federation.server.admission import Form, Vault, admit
from fedproxy.federation.server.expected import Expected
from fedproxy.messages import Dropped, Keys, Sites, UpdateFile
from fedproxy.privacy.keys import SHARE_BYTES
from fedproxy.protocol import Broadcast, ClientUpdate

LEAST = 2
"""Clients of a sum that hides anything."""


def key_shares(
    sites: Sites, clients: Sequence[str], run: str, round_: int, attempt: int, folder: Path | None = None
) -> tuple[dict[str, bytes], dict[str, str]]:
    """Ask a round's clients for their signed key shares.

    Args:
        sites: The clients.
        clients: Whom to ask.
        run: Tells this run's sums from another's.
        round_: The round.
        attempt: How often the round was begun before.
        folder: Folder of the server alone, for its copies of what comes as files.

    Returns:
        The shares, and why each client without one is left out; clients verify them, not the server.
    """
    form = Form.of(Broadcast(round_, {"share": torch.empty(SHARE_BYTES, dtype=torch.uint8)}), Expected())
    shares: dict[str, bytes] = {}
    missing: dict[str, str] = {}
    messages = {client: Keys(run, round_, attempt) for client in clients}
    with closing(sites.ask(messages)) as answers:
        for answer in answers:
            if not isinstance(answer, ClientUpdate | UpdateFile):
                missing[answer.client_id] = answer.reason if isinstance(answer, Dropped) else "it sent no key share"
                continue
            try:
                shares[answer.client_id] = admit(answer, form, Vault(folder)).delta["share"].numpy().tobytes()
            except ClientError as error:
                missing[answer.client_id] = f"its key share cannot be used: {one_line(error, 160)}"
    return shares, missing


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
