"""The whole of one run, and what stays of it when it fails."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from fedproxy.config import RunConfig
from fedproxy.errors import CheckpointError, ConfigError, FedProxyError, message_of, shows_causes
from fedproxy.federation.client.log import last_entry
from fedproxy.files import write_text
from fedproxy.interrupts import check_interrupt, describe, interruption
from fedproxy.modules.devices import keep_to_cores
from fedproxy.pipeline.begin import begin, begin_compression
from fedproxy.pipeline.checks import check
from fedproxy.pipeline.context import Run
from fedproxy.pipeline.display import Display
from fedproxy.pipeline.folder import RunFolder
from fedproxy.pipeline.inputs import ChangedInputError
from fedproxy.pipeline.kept_scores import kept_scores
from fedproxy.pipeline.reuse import SharedWork
from fedproxy.pipeline.stage import left_to_do
from fedproxy.pipeline.stages.compress import Compress, Measure
from fedproxy.pipeline.stages.evaluate import Evaluate
from fedproxy.pipeline.stages.federate import Federate
from fedproxy.pipeline.stages.fuse import Fuse
from fedproxy.pipeline.stages.report import Report, report_of
from fedproxy.reporting import RunReport, model_card
from fedproxy.reporting.pages import save_report

RESUME_HINT = "go on with the same command and resume=auto"


def run(config: RunConfig, display: Display | None = None, shared: SharedWork | None = None) -> RunReport:
    """Do everything a recipe says and return the report; a finished run is only read.

    Args:
        config: The recipe.
        display: Where progress is shown.
        shared: What this run may take over from runs that did the same, and leaves to others.

    Raises:
        FedProxyError: If something that a user, a client or a file causes ends the run. The report then says
            ``failed`` and why, and all finished rounds stay.
    """
    check_interrupt()
    keep_to_cores()
    display, others = display or Display(), kept_scores(shared)
    config = check(config, display)
    folder = RunFolder(config.output_dir)
    with folder.held():
        begins = folder.check(config)
        current, last = Run(config, folder, display), Report()
        if not begins and last.is_done(current):
            display.say("this run is finished; nothing left to do")
            return current.finished
        with _told(current):
            begin(current)
            for stage in left_to_do((Compress(), Federate(), Fuse(), Evaluate(others)), current, shared):
                current.now.stage(stage.name)
                stage.do(current)
            current.loggers.close("success")
        for stage in left_to_do((last,), current):
            stage.do(current)
        return current.finished


@contextmanager
def _told(current: Run) -> Iterator[None]:
    """Say in the report why a run ended early, and leave nothing of its exchanges, for the length of a context."""
    folder = current.folder
    try:
        yield
    except ChangedInputError:  # nothing was done: what is there stays
        raise
    except BaseException as error:
        stopped = interruption(error, RESUME_HINT)
        if folder.is_claimed:  # what is not claimed is as it was
            _report_failure(current, _reason(stopped or error))
            if shows_causes() and "/logs/worker_" in str(error):  # clients' logs were shown when they were dropped
                error.add_note(last_entry(str(error), folder.root))
        if stopped is not None:
            raise stopped from None
        raise
    finally:
        if folder.is_claimed:
            folder.clear_exchange()
            current.now.remove()


def _report_failure(current: Run, reason: str) -> None:
    """Say why a run ended, as far as that can be written: what ended it matters more.

    The report of a run that was finished, and was to go on, stays as long as the scores that it tells of are there.
    """
    with suppress(Exception):
        if not _is_reported(current):
            save_report(report_of(current, status="failed", error=reason), current.folder.root)
    with suppress(Exception):
        current.loggers.close("failed")


def _is_reported(current: Run) -> bool:
    try:
        current.verify("evaluation")
        return RunReport.load(current.folder.report).run.status == "completed"
    except CheckpointError:
        return False


def compress_only(config: RunConfig, display: Display | None = None) -> RunReport:
    """Make the proxy, measure its fidelity and return the report; :func:`run` with resume=auto goes on from there.

    An error leaves nothing in a folder that was not there before, was empty, or is overwritten.

    Raises:
        FedProxyError: If something that a user or a file causes ends it, or the folder holds a run that is further.
    """
    check_interrupt()
    keep_to_cores()
    display = display or Display()
    early = [name for name in config.evaluation.models if name in ("target", "proxy")]
    evaluation = dataclasses.replace(config.evaluation, models=early)
    config = check(dataclasses.replace(config, evaluation=evaluation), display, fidelity=True)
    folder = RunFolder(config.output_dir)
    with folder.held():
        if config.resume == "auto" and folder.is_past_compression():
            raise ConfigError(
                f"output_dir {folder.root} holds a run that is past compression, and its report would be lost; go on "
                "with it by python -m fedproxy.fit, or compress into another output_dir"
            )
        folder.check(config)
        try:
            return _compress_only(Run(config, folder, display))
        except BaseException:
            if folder.is_claimed:
                folder.clear()
            raise


def _compress_only(current: Run) -> RunReport:
    texts = begin_compression(current)
    for stage in left_to_do((Compress(), Measure(texts), Evaluate(kept_scores(None))), current):
        stage.do(current)
    report = report_of(current, status="completed")
    save_report(report, current.folder.root)
    card = model_card("proxy", report.scores, parameters=report.cost.proxy_parameters)
    write_text(current.folder.proxy / "README.md", card)
    return report


def _reason(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return describe(error)
    text = message_of(error)
    return text if isinstance(error, FedProxyError) else f"{type(error).__name__}: {text}"
