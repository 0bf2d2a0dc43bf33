"""A report in a few lines for the terminal."""

from fedproxy.reporting.formatting import change, score
from fedproxy.reporting.run_report import RunReport
from fedproxy.reporting.scores import headline_metric, value_of


def summary(report: RunReport) -> str:
    """Return each model's mean score with its standard error and its difference to the target, one line a model."""
    metric = headline_metric(report.scores)
    if metric is None:
        return "no model was scored"
    values = {model: value_of(tasks["mean"], metric) for model, tasks in report.scores.items()}
    target = values.get("target")
    lines = [f"mean {metric} over {len(next(iter(report.scores.values()))) - 1} tasks, per cent"]
    for model, value in values.items():
        gain = "" if value is None or target is None or model == "target" else f"  {change(value.minus(target))}"
        lines.append(f"  {model:12} {score(value)}{gain}")
    return "\n".join(lines)
