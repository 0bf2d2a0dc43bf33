"""A run that goes on, as one page: the round with its clients, and the rounds before it; without script, like a report.

The page loads itself again; see :mod:`fedproxy.pipeline.watch` for what serves it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedproxy.files import parse_json
from fedproxy.reporting import formatting as show
from fedproxy.reporting.html import render
from fedproxy.reporting.plots import draw_plots
from fedproxy.reporting.round_tables import clients_table, dropped_table, rounds_table
from fedproxy.reporting.run_report import RoundReport, RunInfo, RunReport, check_round
from fedproxy.reporting.schema import decode
from fedproxy.reporting.svg import Plot
from fedproxy.reporting.tables import Table, all_shown, shown
from fedproxy.reporting.view import presentable

RELOAD_S = 2
"""Seconds after which the page of a run that goes on loads itself again."""
MOST_ROWS = 100
"""Rows of a table; a federation may have more clients and rounds than anybody reads."""
_LATE_FACTOR, _LATE_S = 1.5, 5.0
_STAGES = {
    "compress": "making the proxy",
    "federate": "tuning with the clients",
    "fuse": "fusing",
    "evaluate": "asking the models",
}


@dataclass(frozen=True)
class Now:
    """Where a run is; times are seconds since 1970."""

    stage: str = ""
    """Name of the stage, as in ``fedproxy.pipeline.stages``."""
    since: float = 0.0
    """When it began."""
    round: int = 0
    """The round that runs, from 1; 0 outside of the rounds."""
    rounds: int = 0
    began: float = 0.0
    """When the round began."""
    clients: Sequence[str] = ()
    """Who takes part in it."""
    answered: Mapping[str, float] = field(default_factory=dict)
    """Seconds until a client's update was taken."""
    dropped: Mapping[str, str] = field(default_factory=dict)
    """Why a client's was not."""
    before: Mapping[str, float] = field(default_factory=dict)
    """``answered`` of the round before, by which clients are called late."""


def read_now(text: bytes) -> Now:
    """Return what a run's file says of it; nothing where it cannot be read.

    The file may be anybody's: its texts become one printable line each.
    """
    try:
        now = decode(Now, all_shown(parse_json(text, dict)))
    except ValueError:
        return Now()
    times = (now.since, now.began, *now.answered.values(), *now.before.values())
    return now if all(map(math.isfinite, times)) else Now()


def read_rounds(lines: Sequence[bytes]) -> list[RoundReport]:
    """Return the rounds of a journal's lines, without those that cannot be read."""
    rounds = []
    for line in lines:
        try:
            found = decode(RoundReport, parse_json(line, dict))
            check_round(found)
        except ValueError:
            continue
        rounds.append(found)
    return rounds


@dataclass(frozen=True)
class Finished:
    """What is shown of the rounds that are over; made anew when another one is."""

    rounds: Table | None
    left_out: int
    """Rounds before the first that the table shows."""
    clients: Table | None
    dropped: Table | None
    plots: Sequence[Plot]
    up: str
    down: str
    first: int
    """The first round that is known: of a very long journal only the end is read."""
    count: int

    @classmethod
    def of(cls, rounds: Sequence[RoundReport]) -> "Finished":
        """Return the tables and plots of a run's rounds."""
        report = presentable(RunReport(RunInfo("", "", "completed", 0, ""), rounds=rounds))
        rounds, last = report.rounds, report.rounds[-MOST_ROWS:]
        return cls(
            rounds=rounds_table(last),
            left_out=max(0, last[0].round - 1) if last else 0,
            clients=_cut(clients_table(rounds[-1])) if rounds else None,
            dropped=_cut(dropped_table(last[::-1])),
            plots=draw_plots(report),
            up=show.size(sum(line.upload_bytes or 0 for line in rounds)),
            down=show.size(sum(line.download_bytes or 0 for line in rounds)),
            first=rounds[0].round if rounds else 1,
            count=rounds[-1].round if rounds else 0,
        )


def watch_page(name: str, finished: Finished, now: Now, *, runs: bool, clock: float) -> str:
    """Return the page.

    Args:
        name: The run's name.
        finished: The rounds that are over.
        now: Where the run is.
        runs: Whether it goes on; the page of one that does not is not loaded again.
        clock: Seconds since 1970.
    """
    state = _STAGES.get(now.stage, "starting") if runs else "not running"
    facts = [("State", state)]
    if runs and now.since:
        facts.append(("For", show.duration(max(0.0, clock - now.since))))
    facts += [("Rounds", f"{finished.count} of {now.rounds}" if now.rounds else str(finished.count))]
    since = f" since round {finished.first}" if finished.first > 1 else ""
    facts += [(f"Uploaded{since}", finished.up), (f"Downloaded{since}", finished.down)]
    present = clients_now(now, clock) if runs and now.round else None
    return render(
        "watch.html.j2",
        title=shown(name),
        facts=facts,
        runs=runs,
        reload=RELOAD_S,
        round=now.round,
        done=f"{len(now.answered)} of {len(now.clients)} clients answered",
        present=present,
        left_out=max(0, len(now.clients) - MOST_ROWS),
        finished=finished,
    )


def clients_now(now: Now, clock: float) -> Table:
    """Return one row for each client of the round that runs: late ones first, then those that are waited for.

    A client is late when it is waited for half as long again as it took in the round before, and five seconds more.
    """
    waiting = max(0.0, clock - now.began)
    rows = []
    for client in now.clients:
        took = now.before.get(client)
        if client in now.dropped:
            rows.append((2, client, "dropped", now.dropped[client]))
        elif client in now.answered:
            rows.append((3, client, "answered", f"after {show.duration(now.answered[client])}"))
        elif took is not None and waiting > _LATE_FACTOR * took + _LATE_S:
            words = f"for {show.duration(waiting)}; it took {show.duration(took)} in the round before"
            rows.append((0, client, "late", words))
        else:
            rows.append((1, client, "waited for", f"for {show.duration(waiting)}"))
    return Table(["client", "state", ""], [row[1:] for row in sorted(rows)[:MOST_ROWS]])


def _cut(table: Table | None) -> Table | None:
    return None if table is None else Table(table.head, table.rows[:MOST_ROWS])
