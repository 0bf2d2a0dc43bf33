"""What a run promised about its clients' privacy, and what it spent."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedproxy.reporting import formatting as show
from fedproxy.reporting.tables import Table

_UNITS = {"example": "one row of a client", "client": "everything of one client"}


@dataclass(frozen=True)
class PrivacyReport:
    """Differential privacy of what left clients."""

    unit: str
    """``example`` or ``client``."""
    epsilon: float | None = None
    """Most that a client spent, over all runs in its ledger; None without noise, which promises nothing."""
    budget: float | None = None
    """Epsilon that no client may exceed; None is no bound."""
    delta: float | None = None
    accountant: str = "pld"
    sampling: str = "none"
    """Draw that was accounted for: poisson, without_replacement or none."""
    noise_multiplier: float | None = None
    """Least of all clients and rounds, in units of the clip."""
    clip: float | None = None
    """Of the last round, where it follows the updates' norms."""
    quantile: float | None = None
    """Share of updates that the clip should leave whole, where it follows them."""
    noise_at: str = "client"
    withheld: Sequence[str] = ()
    """What clients did not tell."""
    foreseeable: bool = False
    """Whether the noise came from a test seed: whoever knows it takes it off."""


def privacy_table(found: PrivacyReport | None) -> Table | None:
    """Return what was promised and spent, one line each; None without privacy."""
    if found is None:
        return None
    spent = "without bound: there was no noise" if found.epsilon is None else show.number(found.epsilon, 4)
    follows = "" if found.quantile is None else f", follows the quantile {found.quantile:g}"
    rows = [
        ("protected", _UNITS.get(found.unit, found.unit)),
        ("epsilon, most of a client", spent),
        ("budget", show.NONE if found.budget is None else show.number(found.budget, 4)),
        ("delta", show.NONE if found.delta is None else f"{found.delta:g}"),
        ("accountant, sampling", f"{found.accountant}, {found.sampling}"),
        ("noise, in units of the clip", show.number(found.noise_multiplier, 4)),
        (f"clip{follows}", show.number(found.clip, 4)),
        ("noise added by", f"the {found.noise_at}"),
        ("withheld by clients", ", ".join(found.withheld)),
    ]
    if found.foreseeable:
        rows.append(("warning", "the noise came from privacy.test_seed, so that it hides nothing"))
    return Table(["privacy", ""], [list(row) for row in rows])
