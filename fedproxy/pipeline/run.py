"""The whole of one run, and what stays of it when it fails."""

import dataclasses
import resource
import sys
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import torch

from fedproxy.config import RunConfig, to_dict
from fedproxy.data.assets import catalog, fetch, resolve
from fedproxy.errors import CheckpointError, ConfigError, FedProxyError
from fedproxy.evaluation.harness import check_tasks, missing_assets
from fedproxy.federation.client_rows import ClientRows
from fedproxy.federation.partition import check_same_owners, heterogeneity, save_partition
from fedproxy.models import LayerMap, check_model
from fedproxy.modules.trainer import make_trainer
from fedproxy.pipeline.data import client_rows, rows_sha256
from fedproxy.pipeline.display import Display
from fedproxy.pipeline.evaluation import evaluate, scores_file
from fedproxy.pipeline.folder import RunFolder, read_json
from fedproxy.pipeline.stages import Run, compress, federate, fuse, one_device
from fedproxy.plain_json import write_text
from fedproxy.reporting import (
    CompressionReport,
    Cost,
    Exposure,
    RoundReport,
    RunInfo,
    RunReport,
    model_card,
    provenance,
    with_means,
)
from fedproxy.strategies.capabilities import check_capabilities

RESUME_HINT = "go on with the same command and resume=auto"
_ROUND_FIELDS = tuple(item.name for item in dataclasses.fields(RoundReport))


def run(config: RunConfig, display: Display | None = None) -> RunReport:
    """Do everything a recipe says and return the report; a finished run is only read.

    Raises:
        FedProxyError: If something that a user, a client or a file causes ends the run. The report then says
            ``failed`` and why, and all finished rounds stay.
    """
    display = display or Display()
    check_components(config)
    make_trainer(one_device(config.trainer))  # Lightning checks the options' values when it gets them
    fetch_assets(config)
    check_tasks(config.evaluation_tasks, config.evaluation.limit, config.evaluation.num_fewshot)
    folder = RunFolder(config.output_dir)
    folder.open(config)
    current = Run(config, folder, display)
    if current.facts.get("finished") == _goal(config) and folder.report.is_file():
        display.say("this run is finished; nothing left to do")
        return RunReport.load(folder.report)
    current.note(started=current.facts.get("started") or datetime.now(UTC).isoformat(timespec="seconds"))
    scores: dict[str, Any] = {}
    try:
        clients = _clients(current)
        compress(current, clients)
        model, progress = federate(current, clients)
        tuned = fuse(current, model, progress.round)
        for name, score in evaluate(current, tuned, progress.round):
            scores[name] = score  # noqa: PERF403 (what was scored before an error is kept)
    except BaseException as error:
        with suppress(CheckpointError):  # where nothing can be written any more, the error itself matters more
            _report(current, scores, status="failed", error=_reason(error)).save(folder.root)
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(RESUME_HINT) from None
        raise
    report = _report(current, scores, status="completed", error=None)
    report.save(folder.root)
    _write_cards(current, report)
    current.note(finished=_goal(config))
    return report


def fetch_assets(config: RunConfig) -> None:
    """Bring every asset that the recipe names into the cache, so that the rest of the run needs no network.

    Raises:
        AssetError: If an asset is unknown or cannot be fetched.
        ModelError: If the target is no decoder-only causal LM.
    """
    for name in missing_assets([*config.data.tasks, *config.evaluation_tasks]):
        fetch(name)
    check_model(resolve(config.target.path) or config.target.path)
    resolve(config.compression.calibration.path)


def check_components(config: RunConfig) -> None:
    """Refuse a recipe whose components do not go together, before anything is loaded.

    Raises:
        ConfigError: One line that names key, rule and way out.
    """
    clients = config.data.partition.count(len(config.data.tasks) + len(config.data.files))
    drawn, least = config.federation.clients_per_round, config.federation.min_clients
    if least is not None and least > clients:
        raise ConfigError(f"federation.min_clients must be at most the {clients} clients there are, got {least}")
    check_capabilities(
        config.aggregator,
        config.regularizer,
        config.server_optimizer,
        clients_per_round=least or (clients if drawn == "all" else int(drawn)),
        space=config.federation.space,
    )
    if not config.aggregator.aggregates and config.federation.rounds and clients > 1:
        raise ConfigError(
            f"aggregator.name: {config.aggregator.name!r} keeps one state per client, and a run keeps one for all; "
            "choose a rule that merges, or data.partition.name=pooled"
        )
    _refuse_what_the_loop_lacks(config)


def _refuse_what_the_loop_lacks(config: RunConfig) -> None:
    """Refuse rules that are exact by themselves but need more from the round loop than it gives."""
    rule, term = config.aggregator, config.regularizer
    devices = config.trainer.get("devices", "auto")
    if devices not in ("auto", 1, "1") and not (isinstance(devices, list) and len(devices) == 1):
        raise ConfigError(
            f"trainer.devices must be auto, 1 or a list of one device, got {devices!r}; "
            "every client trains on one device"
        )
    if rule.moves_base or not rule.shares("module.lora_B.weight"):
        what = "changes the frozen weights" if rule.moves_base else "leaves B with each client"
        raise ConfigError(
            f"aggregator.name: {rule.name!r} {what}, which the round loop does not support; "
            "choose flexlora or federation.space=product for exact products, ffa_lora for one shared factor"
        )
    if term.keeps_client_memory or term.keeps_shared_memory:
        raise ConfigError(
            f"regularizer.name: {term.name!r} needs memory of every client between rounds, which the round loop does "
            "not keep; choose none, proximal or conflict"
        )


def _clients(current: Run) -> ClientRows:
    clients = client_rows(current.config.data, seed=current.config.seed)
    check_same_owners(clients, current.folder.partition)
    save_partition(clients, current.folder.partition)
    current.note(data_sha256=rows_sha256(clients))
    figures = ", ".join(f"{by} {value:.2f}" for by, value in heterogeneity(clients).items())
    kept = ClientRows(clients, current.folder.rows)
    current.display.say(f"{len(clients)} clients ({_sizes(kept)} rows); distance from the pooled data by {figures}")
    return kept


def _sizes(clients: ClientRows) -> str:
    if len(clients) <= 16:
        return ", ".join(f"{name} {rows}" for name, rows in clients.sizes.items())
    return f"{min(clients.sizes.values())} to {max(clients.sizes.values())}"


def _report(current: Run, scores: dict[str, Any], *, status: str, error: str | None) -> RunReport:
    config, facts = current.config, current.facts
    rounds = current.folder.rounds()
    evaluations = [read_json(scores_file(current.folder, name)) for name in scores]
    seconds = facts["seconds"]
    server = sum(seconds.values()) + sum(line["server_seconds"] for line in rounds)
    evaluated = sum(kept["seconds"] for kept in evaluations if kept)
    named = with_means(scores)
    target, proxy = facts.get("target_parameters"), facts.get("proxy_parameters")
    return RunReport(
        run=RunInfo(
            recipe=config.recipe,
            method=config.method,
            status=status,
            seed=config.seed,
            started=facts["started"],
            seconds=sum(seconds.values()) + sum(line["seconds"] for line in rounds) + evaluated,
            error=error,
        ),
        scores=named,
        cost=Cost(
            target_parameters=target,
            proxy_parameters=proxy,
            trainable_parameters=facts.get("trainable_parameters"),
            upload_bytes=sum(line["upload_bytes"] for line in rounds),
            download_bytes=sum(line["download_bytes"] for line in rounds),
            client_seconds=sum(line["client_seconds"] for line in rounds),
            server_seconds=server,
            evaluation_seconds=evaluated,
            peak_memory_bytes=_peak_memory_bytes(),
        ),
        exposure=Exposure.measure(named, proxy / target) if target and proxy else Exposure(),
        rounds=[RoundReport(**{key: line[key] for key in _ROUND_FIELDS if key in line}) for line in rounds],
        provenance=provenance(facts.get("target_sha256"), facts.get("data_sha256")),
        compression=_compression(current),
        notes=_notes(config),
    )


def _write_cards(current: Run, report: RunReport) -> None:
    """Give ``proxy/`` and ``fused/`` model cards with the numbers."""
    cost, folder = report.cost, current.folder
    write_text(folder.proxy / "README.md", model_card("proxy", report.scores, parameters=cost.proxy_parameters))
    method = current.config.method
    fused = model_card("fused", report.scores, method=method, parameters=cost.target_parameters, notes=report.notes)
    write_text(folder.fused / "README.md", fused)


def _compression(current: Run) -> CompressionReport | None:
    scores = current.facts.get("block_scores")
    if scores is None or not current.folder.layer_map.is_file():
        return None
    return CompressionReport(scores, LayerMap.load(current.folder.layer_map).proxy_to_target)


def _notes(config: RunConfig) -> list[str]:
    asset = catalog().get(config.target.path.removeprefix("asset:"))
    return [] if asset is None else [f"The target is {asset.about}."]


def _goal(config: RunConfig) -> dict[str, Any]:
    """Return what may differ between a finished run and one that goes on from it."""
    return {"rounds": config.federation.rounds, "evaluation": to_dict(config.evaluation)}


def _reason(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return f"interrupted; {RESUME_HINT}"
    text = " ".join(str(error).split())
    return text if isinstance(error, FedProxyError) else f"{type(error).__name__}: {text}"


def _peak_memory_bytes() -> int:
    """Return the most memory this process had resident, plus what was allocated on a GPU."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return peak + (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)
