"""A report in a few lines for the terminal."""

from typing import TYPE_CHECKING

from fedproxy.reporting.formatting import measured, measured_change, unit
from fedproxy.reporting.scores import headline_metric, value_of

if TYPE_CHECKING:
    from fedproxy.reporting.run_report import RunReport


def summary(report: "RunReport") -> str:
    """Return each model's mean score with its standard error and its difference to the target, one line a model."""
    metric = headline_metric(report.scores)
    if metric is None:
        return "the scored tasks have no metric in common" if report.scores else "no model was scored"
    values = {model: value_of(tasks["mean"], metric) for model, tasks in report.scores.items()}
    target = values.get("target")
    counted = f", {unit(metric).removeprefix('in ')}" if unit(metric) else ""
    lines = [f"mean {metric} over {len(next(iter(report.scores.values()))) - 1} tasks{counted}"]
    for model, value in values.items():
        compared = value is not None and target is not None and model != "target"
        gain = f"  {measured_change(metric, value.minus(target))}" if compared and value and target else ""
        lines.append(f"  {model:12} {measured(metric, value)}{gain}")
    return "\n".join(lines)
