"""How much releases reveal together, by dp-accounting, and the least noise that keeps a budget."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

from fedproxy.errors import ConfigError

_CLOSE = 1e-3
"""How much of a budget a calibrated noise multiplier may leave, relative to it."""
_USED_UP = 0.01
"""A budget of which less than this share is left is used up: no noise that lets anything be learnt keeps it."""
MOST_EPSILON = 1e3
"""Largest budget: e to the power of it is beyond all odds that mean anything."""
MOST_NOISE = 1e6
"""Largest noise multiplier that is looked for."""
_LEAST_NOISE = 1e-3
"""Least noise multiplier that counts as noise: it hides nothing, and the square of a far smaller one is lost, from
which accountants then find that nothing is revealed."""
_MOST_RATIO = 1e12
"""Largest ratio of spent to budget that is told apart."""


@dataclass(frozen=True, order=True)
class Release:
    """One or several looks at the data with Gaussian noise.

    Poisson samples and whole looks are accounted for under adding or removing one unit, where one unit changes a sum
    by at most the clip; draws of a fixed size under replacing one, which changes it by twice that.
    """

    noise_multiplier: float
    """Standard deviation of the noise in units of the clip; 0 for no noise."""
    sampling: str = "none"
    """How units are drawn for a look: poisson, without_replacement, or none for all of them."""
    rate: float = 1.0
    """Chance of a unit to be drawn, in (0, 1]."""
    drawn: int = 0
    """Units of a draw, for without_replacement."""
    of: int = 0
    """Units there are, for without_replacement."""
    steps: int = 1
    """Looks, each with a draw and noise of its own."""

    def times(self, count: int) -> "Release":
        """Return ``count`` of these."""
        return replace(self, steps=self.steps * count)

    @property
    def relation(self) -> str:
        """Which data sets are neighbours: ``add_or_remove`` or ``replace``."""
        return "replace" if self.sampling == "without_replacement" else "add_or_remove"

    def plain(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)


def spent(releases: Iterable[Release], delta: float, accountant: str = "pld") -> float:
    """Return the epsilon of releases taken together, at ``delta``.

    Args:
        releases: What was or will be seen, in any order.
        delta: In (0, 1).
        accountant: ``pld`` or ``rdp``.

    Raises:
        ConfigError: If dp-accounting is missing, or releases of different neighbours come together.
    """
    counts: Counter[Release] = Counter()
    for release in releases:
        counts[replace(release, steps=1)] += release.steps
    merged = tuple(sorted(replace(release, steps=steps) for release, steps in counts.items() if steps))
    return _spent(merged, delta, accountant)


@lru_cache(maxsize=4096)
def _spent(releases: tuple[Release, ...], delta: float, accountant: str) -> float:
    if not releases:
        return 0.0
    if any(release.noise_multiplier < _LEAST_NOISE for release in releases):
        return math.inf
    relations = {release.relation for release in releases}
    if len(relations) > 1:
        raise ConfigError(
            "privacy.sampling: releases under adding or removing and under replacing one unit do not add up; use one "
            "privacy.sampling for all runs of a ledger"
        )
    if accountant == "pld" and _rough(releases, delta) > MOST_EPSILON:
        by_renyi = _spent(releases, delta, "rdp")
        if by_renyi > MOST_EPSILON:  # a bound as well, where distributions would fill the memory
            return by_renyi
    made = _accountant(accountant, relations.pop())
    with _calm():
        for release in releases:
            made.compose(event(release))
        return float(made.get_epsilon(delta))


def _rough(releases: Iterable[Release], delta: float) -> float:
    """Return a loose upper bound of the epsilon of releases, as if every look were at all units."""
    looks = sum(release.steps / release.noise_multiplier**2 for release in releases)
    return looks / 2 + math.sqrt(2 * looks * math.log(1 / delta))


def event(release: Release) -> Any:
    """Return a release as dp-accounting's event."""
    dp = _dp_accounting()
    if release.sampling == "poisson":
        look = dp.PoissonSampledDpEvent(release.rate, dp.GaussianDpEvent(release.noise_multiplier))
    elif release.sampling == "without_replacement":  # one replaced unit moves the sum by twice the clip
        look = dp.SampledWithoutReplacementDpEvent(
            release.of, release.drawn, dp.GaussianDpEvent(release.noise_multiplier / 2)
        )
    else:
        look = dp.GaussianDpEvent(release.noise_multiplier)
    return dp.SelfComposedDpEvent(look, release.steps)


@lru_cache(maxsize=1024)
def calibrate(
    planned: Release, epsilon: float, delta: float, accountant: str = "pld", before: tuple[Release, ...] = ()
) -> float:
    """Return the least noise multiplier whose planned releases, with those before, stay within a budget.

    Args:
        planned: All that will be released; its own noise multiplier plays no part.
        epsilon: The budget.
        delta: In (0, 1).
        accountant: ``pld`` or ``rdp``.
        before: What was released already.

    Raises:
        ConfigError: If what was released before leaves nothing.
    """
    already = spent(before, delta, accountant)

    def left(noise: float, kind: str) -> float:
        """Return log(epsilon spent / budget): at most 0 where the budget is kept."""
        together = spent([*before, replace(planned, noise_multiplier=noise)], delta, kind)
        return math.log(min(max(together / epsilon, 1 / _MOST_RATIO), _MOST_RATIO))

    if already > epsilon * (1 - _USED_UP) or not can_keep(planned, epsilon, delta, accountant, before):
        raise ConfigError(
            f"privacy.epsilon must be above the {already:.3g} that was spent on these rows before (delta {delta:g}), "
            f"got {epsilon:g}; raise privacy.epsilon, the total of all runs on them, or use other rows"
        )
    if left(MOST_NOISE, "rdp") > 0:  # Rényi divergences alone leave nothing, the tighter account does
        return _least(lambda noise: left(noise, accountant), 1.0)
    found = _least(lambda noise: left(noise, "rdp"), 1.0)
    return found if accountant == "rdp" else _least(lambda noise: left(noise, accountant), found)


def can_keep(
    planned: Release, epsilon: float, delta: float, accountant: str = "pld", before: tuple[Release, ...] = ()
) -> bool:
    """Return whether any noise keeps planned releases, with those before, within a budget; see :func:`calibrate`."""
    return spent([*before, replace(planned, noise_multiplier=MOST_NOISE)], delta, accountant) <= epsilon


def _least(left: Callable[[float], float], start: float) -> float:
    """Return a noise multiplier at which ``left`` is at most 0 and above -0.001, or one within 0.1 % of the least.

    ``left`` falls with the noise, about as a power of it: the search interpolates in the logarithms.
    """
    low, high = start / 1.3, start
    over, under = left(low), left(high)
    while under > 0:
        low, over = high, under
        high *= 2
        under = left(high)
    while over <= 0:
        high, under = low, over
        low /= 1.5
        over = left(low)
    while under < -_CLOSE and high > low * (1 + _CLOSE):
        share = min(0.98, max(0.02, over / (over - under) + 0.02))
        middle = low * (high / low) ** share
        here = left(middle)
        low, over, high, under = (middle, here, high, under) if here > 0 else (low, over, middle, here)
    return high


def _accountant(name: str, relation: str) -> Any:
    dp = _dp_accounting()
    neighbours = dp.NeighboringRelation
    kind = neighbours.REPLACE_ONE if relation == "replace" else neighbours.ADD_OR_REMOVE_ONE
    if name == "rdp":
        from dp_accounting.rdp import RdpAccountant

        return RdpAccountant(neighboring_relation=kind)
    from dp_accounting.pld import PLDAccountant

    return PLDAccountant(neighboring_relation=kind)


def _dp_accounting() -> Any:
    try:
        import dp_accounting
    except ImportError as error:
        raise ConfigError("privacy needs the package dp-accounting; run pip install 'fedproxy[privacy]'") from error
    return dp_accounting


@contextmanager
def _calm() -> Iterator[None]:
    """Hold back notices about Rényi orders that do not converge: others are taken."""
    import logging

    loud = logging.getLogger("absl")
    level = loud.level
    loud.setLevel(logging.ERROR)
    try:
        yield
    finally:
        loud.setLevel(level)
