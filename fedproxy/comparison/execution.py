"""The runs of a comparison: what has a record is not repeated, what was killed goes on, what fails is told."""

import gc
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedproxy.comparison.arguments import Method, Study
from fedproxy.comparison.fairness import TRAINER_PLACES
from fedproxy.config import RunConfig, load_config, to_dict
from fedproxy.errors import ConfigError, FedProxyError
from fedproxy.files import plain, write_text
from fedproxy.locks import locked
from fedproxy.pipeline.context import Facts
from fedproxy.pipeline.display import Display
from fedproxy.pipeline.evaluation import check_comparable, expanded
from fedproxy.pipeline.folder import RunFolder
from fedproxy.pipeline.reads import flat
from fedproxy.pipeline.reuse import SharedWork
from fedproxy.pipeline.run import run
from fedproxy.reporting.comparison.records import Record
from fedproxy.reporting.run_report import RunReport

_FREE = {"accept_changed", "output_dir", "resume", "overwrite", "recipe", "method", "plugins", "loggers", "engine"}
_FREE_KEYS = {"evaluation.batch_tokens", "target.max_shard_size", *(f"trainer.{name}" for name in TRAINER_PLACES)}
_OPEN = ("data.files", "trainer")
"""Mappings with keys of the user's choice: compared whole, as a key that one side lacks is a difference there."""


@dataclass(frozen=True)
class Cell:
    """One run: a method under a seed."""

    method: Method
    seed: int
    config: RunConfig
    record: Path
    """Where its record is kept."""

    @property
    def name(self) -> str:
        """How lines and errors call it."""
        return f"{self.method.label}, seed {self.seed}"


@dataclass(frozen=True)
class Outcome:
    """What became of a run."""

    cell: Cell
    record: Record | None
    error: str | None = None
    """One line on why there is no record; None where the run has not been tried."""


def cells(study: Study) -> list[Cell]:
    """Return every run of a study, seed by seed, with its whole configuration.

    Raises:
        ConfigError: If a recipe or an override cannot be used; the line names the method.
    """
    return [make_cell(study, method, seed) for seed in study.seeds for method in study.methods]


def make_cell(study: Study, method: Method, seed: int, *, changes: Sequence[str] = (), part: str = "") -> Cell:
    """Return one run.

    Args:
        study: Where its files go.
        method: What is run.
        seed: Its seed.
        changes: Further ``key=value`` words.
        part: Names the run apart from the method's own one.

    Raises:
        ConfigError: If the method's words make no recipe; names the method.
    """
    place = study.work_dir / "runs" / f"{method.label}{part}" / f"seed_{seed}"
    words = [*method.arguments, *changes, f"seed={seed}", f"output_dir={place}", "resume=auto", "overwrite=false"]
    try:
        config = expanded(load_config(words))
    except ConfigError as error:
        raise ConfigError(f"{method.label}: {error}") from None
    return Cell(method, seed, config, study.output_dir / "records" / f"{method.label}{part}" / f"seed_{seed}.json.gz")


def do_runs(todo: Sequence[Cell], study: Study, display: Display) -> list[Outcome]:
    """Do every run that has no record yet, one after another.

    A run that fails leaves its error, and its folder to go on from; all others are done.

    Raises:
        ConfigError: If a record, or a run that was not finished, was made under another configuration; nothing is run
            then.
        EvaluationError: If a task is unknown, cannot be loaded or has no accuracy; nothing is run then.
    """
    found = [_recorded(cell) for cell in todo]
    if study.only_report:
        return [Outcome(cell, record) for cell, record in zip(todo, found, strict=True)]
    new = [cell for cell, record in zip(todo, found, strict=True) if record is None]
    for cell in new:
        RunFolder(cell.config.output_dir).check_continues(cell.config, "delete that folder to run it anew")
    if new:
        check_comparable(new[0].config)  # all are asked the same
    shared = shared_work(study)
    outcomes = []
    for number, (cell, record) in enumerate(zip(todo, found, strict=True), start=1):
        display.say(f"[{number}/{len(todo)}] {cell.name}{': finished before' if record else ''}")
        outcomes.append(Outcome(cell, record) if record else _done(cell, shared, study, display))
    return outcomes


def shared_work(study: Study) -> SharedWork:
    """Return what the runs of a study take over from each other."""
    return SharedWork(study.work_dir / "shared")


@contextmanager
def only_one(study: Study) -> Iterator[None]:
    """Keep other processes out of the report's folder and of that of the runs.

    Raises:
        ConfigError: If another one is at work there.
        CheckpointError: If a folder cannot be written.
    """
    with ExitStack() as held:
        held.enter_context(locked(study.output_dir))
        if study.work_dir.resolve() != study.output_dir.resolve():
            held.enter_context(locked(study.work_dir, "work_dir"))
        yield


def _recorded(cell: Cell) -> Record | None:
    """Return the record of an equal run, or None where there is none.

    Settings that only one of both knows are passed over: options come and go between versions.
    """
    if not cell.record.is_file():
        return None
    record = Record.load(cell.record)
    before, after = _compared(record.config), _compared(plain(to_dict(cell.config)))
    for key in sorted(before.keys() & after.keys()):
        if before[key] != after[key]:
            raise ConfigError(
                f"{cell.record} was made with {key}={before[key]!r}, and it is {after[key]!r} now; delete the record "
                f"to run it again, or choose another output_dir"
            )
    return record


def _compared(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a record's run must share."""
    settings = flat({key: value for key, value in config.items() if key not in _FREE})
    found = {key: value for key, value in settings.items() if key not in _FREE_KEYS}
    for name in _OPEN:
        inside = [key for key in found if key.startswith(f"{name}.")]
        found[name] = {key.removeprefix(f"{name}."): found.pop(key) for key in inside}
    return found


def _done(cell: Cell, shared: SharedWork, study: Study, display: Display) -> Outcome:
    folder = RunFolder(cell.config.output_dir)
    try:
        report = run(cell.config, display, shared)
        config = to_dict(cell.config)
        record = Record.of_run(
            folder.root, cell.method.label, config, report, examples_seen(folder, cell.config, report)
        )
        record.save(cell.record)
    except FedProxyError as error:
        return _failed(cell, str(error), display)
    except Exception as error:  # a defect in one method must not lose the other methods' hours
        place = folder.root.with_name(f"{folder.root.name}.traceback.txt")
        write_text(place, traceback.format_exc(), private=True)
        return _failed(cell, f"{type(error).__name__}: {error}", display)
    finally:
        gc.collect()
    if not study.keep_runs:
        _delete_run(folder, display)
    return Outcome(cell, record)


def _delete_run(folder: RunFolder, display: Display) -> None:
    """Delete a run whose record is kept; where something else came into its folder, that and the run stay."""
    try:
        with folder.held():
            folder.remove()
        with suppress(OSError):
            folder.root.rmdir()
    except FedProxyError as error:
        display.say(f"kept {folder.root}: {error}")


def _failed(cell: Cell, error: str, display: Display) -> Outcome:
    line = " ".join(error.split())
    display.say(f"{cell.name} failed: {line}")
    return Outcome(cell, None, line)


def examples_seen(folder: RunFolder, config: RunConfig, report: RunReport) -> int | None:
    """Return how many examples training saw: those of every round's clients, as often as a round passes them.

    None where nobody counted them.
    """
    facts = Facts.load(folder.facts)
    if facts is None or not facts.examples:
        return None
    return sum(config.client.rows_seen(facts.examples[name]) for line in report.rounds for name in line.clients)
