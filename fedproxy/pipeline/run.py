"""The whole of one run, and what stays of it when it fails."""

import dataclasses
import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from fedproxy.config import RunConfig, to_dict
from fedproxy.data.assets import fetch, resolve
from fedproxy.data.owned_texts import OwnedTexts
from fedproxy.data.partition import Clients, check_same_owners, heterogeneity, save_partition
from fedproxy.data.partition.rows import ClientRows
from fedproxy.errors import CheckpointError, ConfigError, FedProxyError
from fedproxy.evaluation.harness import missing_assets
from fedproxy.evaluation.validation import Question
from fedproxy.federation.server.checkpoint import Progress
from fedproxy.files import write_text
from fedproxy.interrupts import check_interrupt, describe, interruption
from fedproxy.models import check_model, load_model, load_tokenizer
from fedproxy.modules.devices import one_device
from fedproxy.modules.trainer import is_slow, make_trainer
from fedproxy.pipeline.checks import check_calibration, check_compression, check_public
from fedproxy.pipeline.components import check_components, check_named_clients
from fedproxy.pipeline.data import client_rows, length_notes, tokenised_lengths
from fedproxy.pipeline.display import Display
from fedproxy.pipeline.evaluation import (
    check_questions,
    evaluate,
    expanded,
)
from fedproxy.pipeline.fidelity import fidelity_texts, measure_fidelity
from fedproxy.pipeline.folder import RunFolder
from fedproxy.pipeline.fusing import check_vocabulary, fuse
from fedproxy.pipeline.inputs import ChangedInputError, check_inputs, same_rows
from fedproxy.pipeline.loggers import check_loggers
from fedproxy.pipeline.outcome import report_of, write_cards
from fedproxy.pipeline.sharing import SharedWork
from fedproxy.pipeline.site_clients import clients_at_sites
from fedproxy.pipeline.stages import Run, compress, federate
from fedproxy.pipeline.tuned import TunedProxies
from fedproxy.pipeline.validation import held_out
from fedproxy.reporting import (
    RunReport,
    model_card,
    with_means,
)
from fedproxy.strategies.trainable.base import TrainableModel

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
    display = display or Display()
    named, config = config, expanded(config)
    check_components(config)
    check_loggers(config.loggers)
    make_trainer(one_device(config.trainer))  # Lightning checks the options' values when it gets them
    fetch_assets(named)  # what a tag stands for is not fetched unasked
    check_compression(config, trains=True)
    check_questions(config, display)
    if config.resume != "auto":
        check_calibration(config)
    folder = RunFolder(config.output_dir)
    with folder.held():
        begins = folder.check(config)
        current = Run(config, folder, display, shared)
        finished = None if begins else _finished(current)
        return _run(current) if finished is None else finished


def _finished(current: Run) -> RunReport | None:
    """Return the report of a run that is finished, or None where something is left to do."""
    folder = current.folder
    if current.facts.get("finished") != _goal(current.config) or not os.path.lexists(folder.report):
        return None
    try:
        report = RunReport.load(folder.report)
    except CheckpointError as error:
        current.display.say(f"the report is made again: {error}")
        return None
    current.display.say("this run is finished; nothing left to do")
    return report


def _run(current: Run) -> RunReport:
    """Do a run's work in its folder, which is held and checked."""
    config, folder = current.config, current.folder
    scores: dict[str, Any] = {}
    try:
        clients, questions = _clients_and_questions(current)
        _warn_of_slowness(current)
        _compress(current, clients)
        check_vocabulary(current)
        model, progress = _federate(current, clients, questions)
        tuned = fuse(current, model, progress, clients)
        for name, score in evaluate(current, tuned, progress.round):
            scores[name] = score  # noqa: PERF403 (what was scored before an error is kept)
        current.loggers.scores(with_means(scores), config.federation.rounds)
        current.loggers.close("success")
    except ChangedInputError:  # nothing was done: what is there stays
        raise
    except BaseException as error:
        stopped = interruption(error, RESUME_HINT)
        if folder.is_claimed:  # what is not claimed is as it was
            _report_failure(current, scores, _reason(stopped or error))
        if stopped is not None:
            raise stopped from None
        raise
    finally:
        if folder.is_claimed:
            folder.clear_exchange()
    report = report_of(current, scores, status="completed", error=None)
    report.save(folder.root)
    write_cards(current, report)
    current.note(finished=_goal(config))
    return report


def _warn_of_slowness(current: Run) -> None:
    if is_slow(current.config.trainer, current.device):
        current.display.say(
            f"trainer.precision={current.config.trainer['precision']} is many times slower than 32-true here: this CPU "
            "cannot multiply bfloat16; stop and set trainer.precision=32-true"
        )


def _report_failure(current: Run, scores: dict[str, Any], reason: str) -> None:
    """Say why a run ended, as far as that can be written: what ended it matters more."""
    with suppress(Exception):
        report_of(current, scores, status="failed", error=reason).save(current.folder.root)
    with suppress(Exception):
        current.loggers.close("failed")


def compress_only(config: RunConfig, display: Display | None = None) -> RunReport:
    """Make the proxy, measure its fidelity and return the report; :func:`run` with resume=auto goes on from there.

    An error leaves nothing in a folder that was not there before, was empty, or is overwritten.

    Raises:
        FedProxyError: If something that a user or a file causes ends it, or the folder holds a run that is further.
    """
    check_interrupt()
    display = display or Display()
    named, config = config, expanded(config)
    evaluation = config.evaluation
    early = [name for name in evaluation.models if name in ("target", "proxy")]
    config = dataclasses.replace(config, evaluation=dataclasses.replace(evaluation, models=early))
    make_trainer(one_device(config.trainer))
    fetch_assets(named)  # what a tag stands for is not fetched unasked
    check_compression(config)
    check_questions(config, display)
    if config.resume != "auto":  # a run to go on with may have all it needs of the texts
        check_calibration(config, held_out=True)
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
    config, folder = current.config, current.folder
    clients, texts = _clients_and_texts(current)
    compress(current, clients)
    measure_fidelity(current, clients.owned, texts)
    scores: dict[str, Any] = {}
    if config.evaluation.models:
        proxy = load_model(folder.proxy, dtype=config.target.dtype)
        untuned = TunedProxies(proxy, config.trainable, {}, seed=config.seed)
        scores = dict(evaluate(current, untuned, rounds=0))
    report = report_of(current, scores, status="completed", error=None)
    report.save(folder.root)
    card = model_card("proxy", report.scores, parameters=report.cost.proxy_parameters)
    write_text(folder.proxy / "README.md", card)
    return report


def fetch_assets(config: RunConfig) -> None:
    """Bring every asset that the recipe names into the cache, so that the rest of the run needs no network.

    Raises:
        AssetError: If an asset is unknown or cannot be fetched.
        ModelError: If the target is no decoder-only causal LM.
    """
    for name in missing_assets([*config.data.tasks, *config.scored_tasks]):
        fetch(name)
    check_model(resolve(config.target.path) or config.target.path)
    resolve(config.compression.calibration.path)


def _clients_and_questions(current: Run) -> tuple[ClientRows, list[Question]]:
    """Deal out the rows, and draw validation questions from what no client owns; nothing reads the rows again here."""
    if current.config.engine.at_sites:
        return clients_at_sites(current), []
    dealt, inputs = _deal(current)
    questions = held_out(current.config, dealt)
    return _claim(current, dealt, inputs), questions


def _clients_and_texts(current: Run) -> tuple[ClientRows, list[str]]:
    """Deal out the rows, and read the public texts for fidelity, where a continued run has not measured it."""
    if current.config.engine.at_sites:
        return clients_at_sites(current), fidelity_texts(current.config, OwnedTexts(()))
    (dealt, inputs), texts = _deal(current), list[str]()
    if current.folder.begins or current.facts.get("fidelity") is None:
        texts = fidelity_texts(current.config, _owned(dealt))  # before the work: too little would throw it away
    return _claim(current, dealt, inputs), texts


def _deal(current: Run) -> tuple[Clients, dict[str, Any] | None]:
    """Read the sources and say who owns which row, as when the run began; nothing is written yet.

    Returns:
        Every client's rows, and where a run goes on what is to be noted of its inputs.
    """
    clients = client_rows(current.config.data, seed=current.config.seed)
    check_named_clients(current.config, clients)
    if current.folder.begins:
        return clients, None
    inputs = check_inputs(current, clients)
    if same_rows(current, inputs):
        check_same_owners(clients, current.folder.partition)
    return clients, inputs


def _claim(current: Run, clients: Clients, inputs: dict[str, Any] | None) -> ClientRows:
    """Begin to write: give every client the file with its rows; counts and hashes stay.

    An older run is deleted here, after all that could speak against the new one was looked at.
    """
    if current.folder.replaces:
        current.target()
        check_public(current.config, _owned(clients))
    current.folder.claim(current.config)
    save_partition(clients, current.folder.partition)
    current.note(**(check_inputs(current, clients) if inputs is None else inputs))
    _count_cuts(current, clients)
    figures = ", ".join(f"{by} {value:.2f}" for by, value in heterogeneity(clients).items())
    kept = ClientRows(clients, current.folder.rows)
    current.display.say(f"{len(clients)} clients ({_sizes(kept)} rows); distance from the pooled data by {figures}")
    return kept


def _count_cuts(current: Run, clients: Clients) -> None:
    """Say how many rows are longer than what the recipe or the model has room for."""
    path = resolve(current.config.target.path) or current.config.target.path
    current.note(lengths=tokenised_lengths(clients, current.config, load_tokenizer(path)))
    for note in length_notes(current.facts["lengths"], current.config.data):
        current.display.say(note)


def _owned(clients: Clients) -> OwnedTexts:
    return OwnedTexts(row for rows in clients.values() for row in rows)


def _sizes(clients: ClientRows) -> str:
    if len(clients) <= 16:
        return ", ".join(f"{name} {rows}" for name, rows in clients.items())
    return f"{min(clients.values())} to {max(clients.values())}"


def _compress(current: Run, clients: ClientRows) -> None:
    if current.shared is None:
        compress(current, clients)
    else:
        current.shared.compress(current, clients.owned, lambda: compress(current, clients))


def _federate(current: Run, clients: ClientRows, questions: Sequence[Question]) -> tuple[TrainableModel, Progress]:
    if current.shared is None:
        return federate(current, clients, questions)
    return current.shared.federate(current, clients.owned, questions, lambda: federate(current, clients, questions))


def _goal(config: RunConfig) -> dict[str, Any]:
    """Return what may differ between a finished run and one that goes on from it."""
    return {"rounds": config.federation.rounds, "evaluation": to_dict(config.evaluation)}


def _reason(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return describe(error)
    text = " ".join(str(error).split())
    return text if isinstance(error, FedProxyError) else f"{type(error).__name__}: {text}"
