"""What a run tells when it ends: the report, its notes, and the cards of its models."""

import dataclasses
import resource
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fedproxy.data.assets import catalog
from fedproxy.errors import CheckpointError
from fedproxy.files import write_text
from fedproxy.pipeline.asked import asked_sha256
from fedproxy.pipeline.context import Run
from fedproxy.pipeline.data import length_notes
from fedproxy.pipeline.evaluation import client_scores, evaluation_notes, scores_file
from fedproxy.pipeline.finished import PAGES
from fedproxy.pipeline.inputs import change_notes, data_sha256
from fedproxy.pipeline.privacy import privacy_report
from fedproxy.pipeline.reads import REPORT
from fedproxy.pipeline.stage import Stage
from fedproxy.pipeline.stages.compress import Compress
from fedproxy.pipeline.stages.evaluate import Evaluate
from fedproxy.pipeline.tuned import folder_of
from fedproxy.pipeline.validation import validation_report
from fedproxy.reporting import (
    CompressionReport,
    Cost,
    Exposure,
    FidelityReport,
    RoundReport,
    RunInfo,
    RunReport,
    model_card,
    provenance,
    with_means,
)
from fedproxy.reporting.at_sites import SiteScores, site_notes
from fedproxy.reporting.pages import save_report
from fedproxy.sealed import first_lost, read_sealed

_ROUND_FIELDS = tuple(item.name for item in dataclasses.fields(RoundReport))


class Report(Stage):
    """The report of a run, and the cards of its models. A run whose report is done is finished."""

    name, past = "report", "reported"
    reads, after = REPORT, (Evaluate,)
    outputs = ("report.json",)

    def inputs(
        self, run: Run, tell: Callable[[str], Any], before: Callable[[Stage], Any], *, without: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Return all that it depends on, and what tells questions from others that the recipe names alike."""
        asked = asked_sha256(run.config, run.asked)
        return super().inputs(run, tell, before, without=without) | ({"asked": asked} if asked else {})

    def whole(self, run: Run) -> bool:
        """Return whether the report can be read, into ``run.report``, and nothing is gone of what the run made.

        Raises:
            CheckpointError: If what is gone cannot be made again.
        """
        try:
            run.report = RunReport.load(run.folder.report)
        except CheckpointError as error:
            run.display.say(f"the report is made again: {error}")
            return False
        lost = first_lost(run.folder.root, run.facts.files, PAGES)
        if lost is not None:
            Compress().whole(run)  # or a line on the proxy, while there is a report
            run.display.say(f"{lost} is gone or not whole: it is made again")
            return False
        return True

    def seal(self, run: Run) -> None:
        """Note nothing: it is the last, and is read anew."""

    def do(self, run: Run) -> None:
        """Write it, into ``run.report`` too."""
        run.report = report_of(run, status="completed")
        save_report(run.report, run.folder.root)
        write_cards(run, run.report)


def report_of(current: Run, *, status: str, error: str | None = None) -> RunReport:
    """Return a run's report.

    Args:
        current: The run, with its scores as far as they came.
        status: ``completed`` or ``failed``.
        error: Why it failed.
    """
    config, facts, scores = current.config, current.facts, current.scores
    rounds = current.folder.rounds()
    evaluations = [read_sealed(scores_file(current.folder, name)) for name in scores]
    seconds = facts.seconds
    server = sum(seconds.values()) + sum(line["server_seconds"] for line in rounds)
    evaluated = sum(kept["seconds"] for kept in evaluations if kept)
    evaluated += sum(line.get("validation_seconds", 0.0) for line in rounds)
    named = with_means(scores)
    target, proxy = facts.target_parameters, facts.proxy_parameters
    disclosed = facts.disclosed_parameters if config.federation.rounds else 0  # no round, no broadcast
    return RunReport(
        run=RunInfo(
            recipe=config.recipe,
            method=config.method,
            status=status,
            seed=config.seed,
            started=facts.started,
            seconds=sum(seconds.values()) + sum(line["seconds"] for line in rounds) + evaluated,
            error=error,
        ),
        scores=named,
        cost=Cost(
            target_parameters=target,
            proxy_parameters=proxy,
            trainable_parameters=facts.trainable_parameters,
            upload_bytes=sum(line["upload_bytes"] for line in rounds) + facts.collected_bytes,
            download_bytes=sum(line["download_bytes"] for line in rounds),
            client_seconds=sum(line["client_seconds"] for line in rounds),
            server_seconds=server,
            evaluation_seconds=evaluated,
            peak_memory_bytes=_peak_memory_bytes(),
        ),
        exposure=Exposure.measure(named, disclosed / target) if target and disclosed is not None else Exposure(),
        rounds=[RoundReport(**{key: line[key] for key in _ROUND_FIELDS if key in line}) for line in rounds],
        provenance=provenance(facts.target_sha256, data_sha256(facts)),
        compression=_compression(current),
        fidelity=FidelityReport(**facts.fidelity) if facts.fidelity else None,
        notes=_notes(current),
        client_scores=client_scores(current.folder, scores),
        validation=validation_report(current),
        privacy=privacy_report(config, rounds),
        at_sites=None if facts.at_sites is None else SiteScores(**facts.at_sites),
        path=current.folder.root,
    )


def write_cards(current: Run, report: RunReport) -> None:
    """Give ``proxy/`` and ``fused/`` model cards with the numbers."""
    cost, folder = report.cost, current.folder
    write_text(folder.proxy / "README.md", model_card("proxy", report.scores, parameters=cost.proxy_parameters))
    method = current.config.method
    wrapper = current.config.fusion.adds_logits
    own = {folder_of(folder.fused, client): scores for client, scores in report.client_scores.items()}
    for path in folder.fused_folders():
        scores = with_means(own[path]) if path in own else report.scores
        card = model_card(
            "fused", scores, method=method, parameters=cost.target_parameters, notes=report.notes, wrapper=wrapper
        )
        write_text(path / "README.md", card)


def _compression(current: Run) -> CompressionReport | None:
    scores = current.facts.block_scores
    if scores is None or not current.folder.layer_map.is_file():
        return None
    return CompressionReport(scores, current.layer_map.proxy_to_target)


def _notes(current: Run) -> list[str]:
    asset = catalog().get(current.config.target.path.removeprefix("asset:"))
    notes = [] if asset is None else [f"The target is {asset.about}."]
    notes += current.facts.data_notes
    notes += length_notes(current.facts.lengths, current.config.data)
    if not current.config.asks:
        key = "evaluation.tasks" if current.config.evaluation.models else "evaluation.models"
        notes.append(f"Nothing was scored: {key} names none.")
    if not current.config.aggregator.aggregates:
        notes.append("No client was merged with another: scores are means over the clients' own models.")
    notes += [*change_notes(current.facts), *current.facts.warnings]
    if current.facts.at_sites is not None:
        notes += site_notes(SiteScores(**current.facts.at_sites))
    for folder, fusion in current.facts.fusion.items():
        notes.append(f"{folder}: fusion chosen on public text without training: scale {fusion.get('scale')}.")
    return [*notes, *evaluation_notes(current.folder, current.config.evaluation.models)]


def _peak_memory_bytes() -> int:
    """Return the most memory this process had resident, plus what was allocated on a GPU."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return peak + (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)
