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
    # Not the mean of the questions' own values: a report divides a task's sum by the sum of its answer tokens.
    nll = {"target": 7.5, "fused": 4.0 + seed / 2}
    scores = {model: {**tasks, "mean": {**tasks["mean"], **({"answer_nll": nll[model]} if model in nll else {})}}
              for model, tasks in report.scores.items()}  # fmt: skip
    report = RunReport.from_dict(replace(report, run=run, cost=cost, scores=scores).to_dict())
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
