"""What a person sees while a run goes on: stages, one line per round, a bar for slow work."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fedproxy.console import progress_console
from fedproxy.errors import one_line
from fedproxy.reporting.formatting import duration, size

LINE_S = 30.0
"""Seconds between lines of progress where the output is no terminal."""


class Display:
    """Prints to standard error, so that standard output stays for results.

    Args:
        console: Where to print; standard error by default.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or progress_console()

    def say(self, message: str) -> None:
        """Print one line."""
        self.console.print(message, markup=False, soft_wrap=True)

    @contextmanager
    def warnings(self) -> Iterator[None]:
        """Print each warning that the package logs as a line, for the length of the context."""
        handler = _Lines(self)
        logger = logging.getLogger("fedproxy")
        logger.addHandler(handler)
        try:
            yield
        finally:
            logger.removeHandler(handler)

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator["Bar"]:
        """Show a progress bar while a stage with ``total`` parts runs, or, where that is no terminal, some lines."""
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        terminal = self.console.is_terminal
        with Progress(*columns, console=self.console, transient=True, disable=not terminal) as progress:
            yield Bar(progress, progress.add_task(label, total=total), None if terminal else self.say)

    @contextmanager
    def counter(self, label: str) -> Iterator[Callable[[int, int], None]]:
        """Show a progress bar that is told how many parts are done, out of how many."""
        with self.bar(label, 1) as bar:
            yield bar.set

    def round(self, record: Mapping[str, Any], rounds: int) -> None:
        """Print a round's line: loss, validation NLL, heterogeneity, conflict, seconds, bytes."""
        parts = [f"round {record['round']}/{rounds}"]
        if record["train_loss"] is not None:
            parts.append(f"loss {record['train_loss']:.3f}")
        if record.get("privacy", {}).get("epsilon") is not None:
            parts.append(f"epsilon {record['privacy']['epsilon']:.2f}")
        validated = record.get("validation", {}).get("mean", {})
        if validated.get("answer_nll") is not None:
            parts.append(f"validation {validated['answer_nll']:.3f}")
        heterogeneity = record.get("heterogeneity")
        if heterogeneity:
            parts.append(f"heterogeneity {sum(heterogeneity) / len(heterogeneity):.2f}")
        if record.get("conflict_mean") is not None:
            parts.append(f"conflict {record['conflict_mean']:.2f}")
        parts.append(f"{record['seconds']:.1f} s")
        parts.append(f"up {size(record['upload_bytes'])}, down {size(record['download_bytes'])}")
        self.say("  ".join(parts))


class _Lines(logging.Handler):
    def __init__(self, display: Display) -> None:
        super().__init__(logging.WARNING)
        self._display = display

    def emit(self, record: logging.LogRecord) -> None:
        self._display.say(one_line(record.getMessage(), 1000))


class Bar:
    """A running progress bar, or the lines that stand in for it.

    Args:
        progress: What shows it.
        task: Which of its tasks it is.
        say: Prints a line; None where the bar itself is seen.
    """

    def __init__(self, progress: Progress, task: TaskID, say: Callable[[str], None] | None = None) -> None:
        self._progress, self._task, self._say = progress, task, say
        self._began = self._said = time.monotonic()
        self._done, self._shares = 0, dict[str, float]()

    def step(self, label: str | None = None, part: str = "") -> None:
        """One part is done, the one of that name if it has one; the bar now shows ``label``, if there is one."""
        self._done += 1
        self._shares.pop(part, None)
        self._show(label)

    def share(self, label: str, part: str, share: float) -> None:
        """A share of one part is done; the bar now shows ``label``."""
        self._shares[part] = share
        self._show(label)

    def set(self, done: int, total: int) -> None:
        """So many parts are done, out of so many."""
        self._progress.update(self._task, completed=done, total=total)
        self._line()

    def _show(self, label: str | None) -> None:
        done = self._done + sum(self._shares.values())
        self._progress.update(self._task, completed=done, description=None if label is None else one_line(label, 120))
        self._line()

    def _line(self) -> None:
        now, task = time.monotonic(), self._progress.tasks[self._task]
        done, total = task.completed, int(task.total or 0)
        if self._say is None or now - self._said < LINE_S or not 0 < done < total:
            return
        self._said = now
        left = (now - self._began) * (total - done) / done
        self._say(f"{task.description}: {int(done)} of {total}, about {duration(left)} left")
