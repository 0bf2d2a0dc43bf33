"""What models score on the rows that clients at real sites hold back: sums over all clients, and nothing of one."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedproxy.reporting import formatting as show
from fedproxy.reporting.tables import Table

_MODELS = {"proxy": "proxy, as it was sent", "proxy_tuned": "proxy, tuned"}


@dataclass(frozen=True)
class SiteScores:
    """Scores that clients took themselves; sums and counts left their sites."""

    clients: int
    """How many clients scored."""
    rows: int
    """Their held-out rows."""
    after_round: int
    """Round after which the tuned proxy was scored."""
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Model to ``answer_nll`` (nats for each answer token) and ``row_nll`` (for each row its mean, then over rows)."""
    missing: Mapping[str, str] = field(default_factory=dict)
    """Clients that hold rows back and did not answer, and why."""


def site_table(found: SiteScores | None) -> Table | None:
    """Return the scores that clients took at their sites; None where none did."""
    if found is None or not found.scores:
        return None
    rows = [
        [_MODELS.get(model, model), show.number(means.get("answer_nll"), 4), show.number(means.get("row_nll"), 4)]
        for model, means in found.scores.items()
    ]
    return Table(["at sites", "answer NLL", "answer NLL, mean over rows"], rows)


def site_notes(found: SiteScores) -> list[str]:
    """Return a sentence on who scored, and one on each client that did not although it holds rows back."""
    words = (
        f"{found.clients} clients scored models on {found.rows} rows that they hold back; sums and counts left them."
    )
    notes = [words] if found.scores else []
    return notes + [f"Client {client} scored nothing at its site: {why}." for client, why in found.missing.items()]
