"""The rounds of a run as tables: one row per round, and one per client of a round."""

from collections.abc import Callable, Mapping, Sequence

from fedproxy.reporting import formatting as show
from fedproxy.reporting.run_report import Numbers, RoundReport
from fedproxy.reporting.tables import Table
from fedproxy.task_means import mean_known


def by_client(line: RoundReport, numbers: Numbers) -> dict[str, float | None]:
    """Return a round's per-client numbers by client; empty where there is only one number for all, or none."""
    if isinstance(numbers, Mapping):
        return dict(numbers)
    if isinstance(numbers, Sequence) and len(numbers) == len(line.clients):
        return dict(zip(line.clients, numbers, strict=True))
    return {}


def mean_of(numbers: Numbers) -> float | None:
    """Return a round's number, or the mean of its per-client numbers that are known."""
    if numbers is None or isinstance(numbers, int | float):
        return numbers
    return mean_known(numbers.values() if isinstance(numbers, Mapping) else numbers)


def validated(line: RoundReport, metric: str) -> float | None:
    """Return a round's mean validation score, or None where it has none."""
    return (line.validation or {}).get("mean", {}).get(metric)


Column = tuple[str, Callable[[RoundReport], str]]
_ROUND_COLUMNS: tuple[Column, ...] = (
    ("round", lambda line: str(line.round)),
    ("clients", lambda line: str(len(line.clients))),
    ("dropped", lambda line: str(len(line.dropped)) if line.dropped else show.NONE),
    ("train loss", lambda line: show.fixed(mean_of(line.train_loss))),
    ("validation NLL", lambda line: show.fixed(validated(line, "answer_nll"))),
    ("validation acc", lambda line: show.percent(validated(line, "acc"))),
    ("validation acc_norm", lambda line: show.percent(validated(line, "acc_norm"))),
    ("validation exact_match", lambda line: show.percent(validated(line, "exact_match"))),
    ("validation f1", lambda line: show.percent(validated(line, "f1"))),
    ("validation rouge_l", lambda line: show.percent(validated(line, "rouge_l"))),
    ("regularizer loss", lambda line: show.number(mean_of(line.regularizer_loss), 2)),
    ("heterogeneity", lambda line: show.fixed(mean_of(line.heterogeneity))),
    ("conflict", lambda line: show.fixed(line.conflict_mean)),
    ("sign agreement", lambda line: show.fixed(mean_of(line.sign_agreement))),
    ("kept density", lambda line: show.fixed(mean_of(line.kept_density))),
    ("factor error", lambda line: show.number(line.factor_mean_error)),
    ("up", lambda line: show.size(line.upload_bytes)),
    ("down", lambda line: show.size(line.download_bytes)),
    ("time", lambda line: show.duration(line.seconds)),
)


def rounds_table(rounds: Sequence[RoundReport]) -> Table | None:
    """Return one row per round with the columns that some round fills; None without rounds."""
    columns = [(name, cell) for name, cell in _ROUND_COLUMNS if any(cell(line) != show.NONE for line in rounds)]
    if not rounds:
        return None
    return Table([name for name, _ in columns], [[cell(line) for _, cell in columns] for line in rounds])


def clients_table(line: RoundReport) -> Table | None:
    """Return what the round says of each client, or None where it says nothing."""
    named = {
        "train loss": line.train_loss,
        "heterogeneity": line.heterogeneity,
        "weight": line.weights,
        "retention": line.retention,
        "update norm": line.update_norms,
    }
    columns = {name: values for name, numbers in named.items() if (values := by_client(line, numbers))}
    if not columns:
        return None
    rows = [[client, *(show.fixed(values.get(client)) for values in columns.values())] for client in line.clients]
    return Table(["client", *columns], rows)


def dropped_table(rounds: Sequence[RoundReport]) -> Table | None:
    """Return one row per client and round that is missing from the result, with the reason; None where none is."""
    rows = [[str(line.round), client, reason] for line in rounds for client, reason in line.dropped.items()]
    return Table(["round", "client", "why"], rows) if rows else None
