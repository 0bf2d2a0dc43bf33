"""What a site asks of the privacy options that the server sends with a round."""

from collections.abc import Mapping, Sequence
from typing import Any

_UNACCOUNTED = ("clip_noise", "statistics")
"""Round parts whose noise, or groups, no budget counts; with unit client, personal tensors are tuned without noise."""


def parts_of(job: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the round parts that a job names, as far as it names any."""
    parts = job.get("parts")
    return [part for part in parts if isinstance(part, Mapping)] if isinstance(parts, Sequence) else []


def clip_of(parts: Sequence[Mapping[str, Any]]) -> Any:
    """Return the clip of a round, None where there is not exactly one part with a clip."""
    found = [part for part in parts if part.get("name") in ("clip_noise", "privacy")]
    return found[0].get("clip") if len(found) == 1 else None


def budget_fault(parts: Sequence[Mapping[str, Any]], epsilon: float, delta: float, unit: str) -> str:
    """Return which rule a round breaks where a budget is asked for; nothing if it keeps all.

    Args:
        parts: The round's parts.
        epsilon: Most of privacy.epsilon, which the client's own ledger then keeps over all runs.
        delta: Most of privacy.delta.
        unit: What must be protected: example, client, or any of both.
    """
    found = [part for part in parts if part.get("name") == "privacy"]
    if len(found) != 1:
        return f"policy.most_epsilon is {epsilon:g}; use privacy.unit with privacy.epsilon of at most that"
    part = found[0]
    for key, most in (("epsilon", epsilon), ("delta", delta)):
        value = part.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
            return f"policy.most_{key} is {most:g}; use privacy.{key} of at most that"
    if part.get("unit") not in ("example", "client") or unit not in ("any", part.get("unit")):
        return f"policy.unit is {unit}; use privacy.unit={'client or example' if unit == 'any' else unit}"
    if part.get("noise_at", "client") != "client":
        return "policy.most_epsilon asks for noise at the site; use privacy.noise_at=client"
    if part["unit"] == "client" and part.get("sampling", "none") != "none":
        return "policy.most_epsilon counts on no draw of clients; use privacy.sampling=none"
    if part.get("test_seed") is not None:
        return "policy.most_epsilon asks for noise that nobody foresees; use privacy.test_seed=null"
    names = {str(other.get("name")) for other in parts}
    others = sorted(names.intersection(_UNACCOUNTED if part["unit"] == "example" else (*_UNACCOUNTED, "personal")))
    return f"policy.most_epsilon does not account for {others[0]}; remove it" if others else ""
