"""Writes tests/golden/privacy.json: epsilons by dp-accounting alone, without a line of FedProxy.

python tests/privacy/golden_privacy.py
"""

import importlib.metadata
import json
import logging
from pathlib import Path

import dp_accounting as dp
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

KINDS = {"pld": PLDAccountant, "rdp": RdpAccountant}


def settings():
    """Yield unit, accountant, delta and release of each case."""
    for noise, rate, steps in ((1.0, 0.1, 50), (0.8, 0.05, 100), (1.5, 0.02, 1000), (2.0, 0.5, 20), (0.6, 0.01, 300)):
        for accountant in KINDS:
            yield "example", accountant, 1e-5, {"noise_multiplier": noise, "sampling": "poisson", "rate": rate}, steps
    for noise, steps, delta in ((1.0, 1, 1e-5), (5.0, 10, 1e-5), (10.0, 50, 1e-6), (3.0, 4, 1e-3)):
        for accountant in KINDS:
            yield "client", accountant, delta, {"noise_multiplier": noise, "sampling": "none"}, steps
    for noise, drawn, of, steps in ((1.0, 10, 100, 50), (2.0, 32, 256, 10), (4.0, 5, 50, 100), (8.0, 100, 1000, 20)):
        draw = {"noise_multiplier": noise, "sampling": "without_replacement", "drawn": drawn, "of": of}
        yield "client", "rdp", 1e-5, draw, steps


def epsilon(accountant, delta, release, steps):
    """Compute one case."""
    gaussian = dp.GaussianDpEvent(release["noise_multiplier"])
    relation = dp.NeighboringRelation.ADD_OR_REMOVE_ONE
    if release["sampling"] == "poisson":
        event = dp.PoissonSampledDpEvent(release["rate"], gaussian)
    elif release["sampling"] == "without_replacement":  # replacing one unit moves the sum by twice the clip
        half = dp.GaussianDpEvent(release["noise_multiplier"] / 2)
        event = dp.SampledWithoutReplacementDpEvent(release["of"], release["drawn"], half)
        relation = dp.NeighboringRelation.REPLACE_ONE
    else:
        event = gaussian
    made = KINDS[accountant](neighboring_relation=relation)
    made.compose(event, steps)
    return made.get_epsilon(delta)


def main():
    logging.getLogger("absl").setLevel(logging.ERROR)
    cases = [
        {
            "name": f"{unit}-{accountant}-{release['sampling']}-{release['noise_multiplier']:g}x{steps}",
            "unit": unit,
            "accountant": accountant,
            "delta": delta,
            "release": {**release, "steps": steps},
            "epsilon": epsilon(accountant, delta, release, steps),
        }
        for unit, accountant, delta, release, steps in settings()
    ]
    content = {"made_by": f"dp-accounting {importlib.metadata.version('dp-accounting')}", "cases": cases}
    path = Path(__file__).parent.parent / "golden" / "privacy.json"
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
