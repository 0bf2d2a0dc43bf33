"""How often a site's rows were trained on, over all runs, and draws that the server cannot foresee."""

import hashlib
import hmac
import secrets
from dataclasses import replace
from pathlib import Path

from fedproxy.files import read_json, read_whole, write_bytes, write_json
from fedproxy.seeding import ClientSeeds
from fedproxy.sites.policy import NotAllowedError, Policy

_BYTES = 32


class TrainedRounds:
    """What a site keeps beside its runs: which rounds it trained in, and a secret of its own.

    Args:
        folder: The site's folder.
    """

    def __init__(self, folder: Path) -> None:
        self._table, self._secret = folder / "trained_rounds.json", folder / "draws.key"

    def note(self, task: str, policy: Policy) -> None:
        """Count a round before it is trained in; one that was counted before is not counted again.

        Args:
            task: What names the round: its run, and all that was asked.
            policy: What is allowed.

        Raises:
            NotAllowedError: If the rows were trained on as often as the policy allows.
        """
        known = read_json(self._table, list) if self._table.exists() else []
        if task in known:
            return
        if len(known) >= policy.most_rounds:
            raise NotAllowedError(f"policy.most_rounds is {policy.most_rounds}, the site has trained in as many")
        write_json(self._table, [*known, task])

    def own_draws(self, seeds: ClientSeeds, task: str, client: str) -> ClientSeeds:
        """Return seeds whose draws for round parts, noise among them, are the site's own secret.

        The same task gets the same draws again, so that asking again and again averages nothing out.
        """
        if not self._secret.exists():
            write_bytes(self._secret, secrets.token_bytes(_BYTES), private=True)
        digest = hmac.digest(read_whole(self._secret, most=_BYTES), f"{task} {client}".encode(), hashlib.sha256)
        return replace(seeds, parts=int.from_bytes(digest[:8], "little") >> 1)
