"""How often a site's rows were trained on, over all runs."""

from pathlib import Path

from fedproxy.files import read_json, write_json
from fedproxy.sites.policy import NotAllowedError, Policy


class TrainedRounds:
    """What a site keeps beside its runs: which rounds it trained in.

    Args:
        folder: The site's folder.
    """

    def __init__(self, folder: Path) -> None:
        self._table = folder / "trained_rounds.json"

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
