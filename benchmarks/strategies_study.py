"""Aggregation rules on the real model: `fedproxy_llama` under each rule at equal budget, several seeds, resumable.

    python -m benchmarks.strategies_study               # every rule, seeds 42 and 43: about 3 minutes a run on 2 cores
    python -m benchmarks.strategies_study --seeds 42    # in parts; finished runs are not repeated
    python -m benchmarks.strategies_study --table       # only write the table from the results that are there

A run's report goes to docs/results/strategies/<rule>_<seed>.json, the table to docs/results/strategies.md.
"""

import argparse
import json
import shutil
import statistics
from pathlib import Path

from fedproxy.config import load_config
from fedproxy.errors import FedProxyError
from fedproxy.pipeline.run import run

RESULTS = Path(__file__).parent.parent / "docs" / "results"
STRENGTHS = ("1.0e-5", "1.0e-3", "1.0e-2", "1.0e-1")
PLAIN = "regularizer.name=none"
RULES = {
    "fedavg": ("aggregator.name=fedavg", PLAIN),
    "fedavg_proximal": ("aggregator.name=fedavg", "regularizer.name=proximal", "regularizer.strength=0.01"),
    "ties": ("aggregator.name=ties", PLAIN),
    "h_ties": (PLAIN,),
    "fedavg_conflict": ("aggregator.name=fedavg",),
    "h_ties_conflict": (),
    "config_mean": ("aggregator.name=config", "aggregator.length=mean", PLAIN),
    "flexlora": ("aggregator.name=flexlora", "federation.space=product", PLAIN),
    **{f"h_ties_conflict_{strength}": (f"regularizer.strength={strength}",) for strength in STRENGTHS[1:]},
}


def main() -> None:
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43])
    parser.add_argument("--runs", type=Path, default=Path("runs/strategies"), help="folder of the run folders")
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args()
    folder = RESULTS / "strategies"
    folder.mkdir(parents=True, exist_ok=True)
    for seed in () if options.table else options.seeds:
        for rule, overrides in RULES.items():
            result = folder / f"{rule}_{seed}.json"
            if result.is_file():
                continue
            out = options.runs / f"{rule}_{seed}"
            words = [f"seed={seed}", "resume=auto", f"output_dir={out}", "evaluation.models=[fused]", *overrides]
            print(f"{rule}, seed {seed}", flush=True)
            try:
                run(load_config(["recipe=fedproxy_llama", *words]))
            except FedProxyError as error:
                print(f"{rule}, seed {seed} failed: {error}", flush=True)
                continue
            shutil.copyfile(out / "report.json", result)
            shutil.rmtree(out)
            write_table(folder)
    write_table(folder)


def write_table(folder: Path) -> None:
    """Write one line per rule: mean over seeds of accuracy and answer NLL, the target's beside them."""
    reports = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    lines = [
        "| rule | seeds | mean acc_norm, % | answer NLL per token | last round's loss |",
        "|---|---:|---:|---:|---:|",
    ]
    for rule in RULES:
        found = [reports[name] for name in reports if name.rpartition("_")[0] == rule]
        if not found:
            continue
        scores = [report["scores"]["fused"]["mean"] for report in found]
        accuracy = [100 * score["acc_norm"] for score in scores]
        error = statistics.mean(100 * score["acc_norm_stderr"] for score in scores)
        nll = statistics.mean(score["answer_nll"] for score in scores)
        loss = statistics.mean(report["rounds"][-1]["train_loss"] for report in found)
        each = f" ({', '.join(f'{value:.1f}' for value in accuracy)})" if len(accuracy) > 1 else ""
        mean = f"{statistics.mean(accuracy):.1f} ± {error:.1f}{each}"
        lines.append(f"| {rule} | {len(found)} | {mean} | {nll:.3f} | {loss:.3f} |")
    (RESULTS / "strategies.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
