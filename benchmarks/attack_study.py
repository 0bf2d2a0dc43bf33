"""Robust rules under attack: two of eight clients of `fedproxy_tiny` send their update times -5.

    python -m benchmarks.attack_study       # about four minutes on 2 cores; writes docs/results/attack.md and .json

Eight clients with an IID share each of the four generated tasks, six rounds, no regularizer; every rule once with
honest clients and once with two attackers in every round, scored on 100 questions per task.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedproxy.config import load_config
from fedproxy.federation.engines.base import Answers, Engine, Sites
from fedproxy.federation.engines.in_process import InProcess
from fedproxy.pipeline.run import run
from fedproxy.protocol import Broadcast, ClientUpdate

RESULTS = Path(__file__).parent.parent / "docs" / "results"
RULES = {
    "fedavg": (),
    "h_ties": (),
    "median": (),
    "trimmed_mean": ("aggregator.beta=0.25",),
    "krum": ("aggregator.byzantine=2",),
    "multi_krum": ("aggregator.byzantine=2", "aggregator.keep=4"),
    "geometric_median": (),
}


@dataclass(frozen=True)
class AttackedEngine(Engine, name="attacked"):
    """Runs clients in this process; the first ``attackers`` of each round send ``factor`` times their update."""

    attackers: int = 2
    factor: float = -5.0

    def start(self, make_client, remote, folder) -> "AttackedClients":
        """Load the clients."""
        return AttackedClients(InProcess().start(make_client, remote, folder), self)


@dataclass
class AttackedClients:
    """The running engine."""

    honest: Sites
    attack: AttackedEngine

    def run(self, broadcast: Broadcast, client_ids: Sequence[str], *, timeout_s: float | None = None) -> Answers:
        """Run the round and spoil what the attackers send."""
        hostile = sorted(client_ids)[: self.attack.attackers]
        for update in self.honest.run(broadcast, client_ids, timeout_s=timeout_s):
            if update.client_id in hostile and isinstance(update, ClientUpdate):
                spoilt = {name: self.attack.factor * tensor for name, tensor in update.delta.items()}
                yield replace(update, delta=spoilt)
            else:
                yield update

    def close(self) -> None:
        """Free what the engine holds."""
        self.honest.close()


def accuracy(rule: str, attackers: int) -> float:
    """Return the fused model's mean acc_norm under a rule."""
    with tempfile.TemporaryDirectory() as folder:
        words = [
            "recipe=fedproxy_tiny",
            f"output_dir={folder}/run",
            "data.partition.name=iid",
            "data.partition.clients=8",
            "regularizer.name=none",
            "engine.name=attacked",
            f"engine.attackers={attackers}",
            f"aggregator.name={rule}",
            *RULES[rule],
            "evaluation.models=[target,fused]",
        ]
        report = run(load_config(words))
    return report.scores["fused"]["mean"]["acc_norm"]


def main() -> None:
    """Run every rule twice and write the table."""
    found = {rule: {"honest": accuracy(rule, 0), "attacked": accuracy(rule, 2)} for rule in RULES}
    lines = ["| rule | honest, % | 2 of 8 attack, % | lost, points |", "|---|---:|---:|---:|"]
    for rule, score in found.items():
        honest, attacked = 100 * score["honest"], 100 * score["attacked"]
        lines.append(f"| {rule} | {honest:.1f} | {attacked:.1f} | {honest - attacked:.1f} |")
    (RESULTS / "attack.json").write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "attack.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
