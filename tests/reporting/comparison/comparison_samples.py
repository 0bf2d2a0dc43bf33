"""Made-up records of several methods and seeds, without any run."""

from dataclasses import replace

from fedproxy.reporting import RunReport
from fedproxy.reporting.comparison.analysis import analyse
from fedproxy.reporting.comparison.records import Record
from fedproxy.reporting.comparison.view import Comparison, EqualBytes, RunLine
from fedproxy.reporting.samples import save_evaluation
from tests.reporting.report_samples import answers, full_report, lm_eval_results

FUSED = {"central": 0.60, "fed<avg>": 0.50, "fedproxy": 0.57}


def make_record(folder, method, seed, fused, config=None, **models):
    """Return a record with the same questions for every method and seed; ``fused`` is the share of right answers."""
    for model, rate in {"target": 0.40, "fused": fused, **models}.items():
        save_evaluation(folder, model, answers(rate), lm_eval_results())
    report = full_report()
    run = replace(report.run, recipe=method, seed=seed)
    cost = replace(report.cost, upload_bytes=report.cost.upload_bytes * (1 + len(method)))
    report = RunReport.from_dict(replace(report, run=run, cost=cost).to_dict())
    return Record.of_run(folder, method, config or {"seed": seed, "client": {"lr": 0.1}}, report, 640)


def make_runs(folder, seeds=(1, 2), rates=FUSED):
    """Return method to records; the second seed is right a little more often."""
    return {
        method: [make_record(folder / f"{method}_{seed}", method, seed, rate + 0.05 * (seed - 1)) for seed in seeds]
        for method, rate in rates.items()
    }


def make_comparison(runs):
    found = analyse(runs, ceiling="central", reference="fedproxy")
    lines = [RunLine(method, record.seed, "completed", 61.0) for method, own in runs.items() for record in own]
    return Comparison(
        title="Made up <b>",
        command="python -m fedproxy.compare study=made_up",
        analysis=found,
        seeds=(1, 2),
        questions=80,
        runs=[*lines, RunLine("broken", 1, "failed", None, "client 'x' failed & stopped")],
        settings={"central": {"compression.name": "none"}, "fed<avg>": {}, "fedproxy": {"aggregator.rho": 1.1}},
        equal_bytes=EqualBytes(found, 3 * 2**20, {"fed<avg>": 6, "fedproxy": 3, "too_dear": 0}),
        notes=["The target is made up."],
    )
