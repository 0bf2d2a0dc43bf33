"""The stages of a run. Each skips what its folder already holds whole, so that a killed run goes on where it was."""

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedproxy.config import RunConfig, to_dict
from fedproxy.data.assets import cache_root, resolve
from fedproxy.errors import CheckpointError
from fedproxy.evaluation.validation import Question
from fedproxy.federation.client.setup import LocalSetup
from fedproxy.federation.client.store import ClientStore
from fedproxy.federation.client_rows import ClientRows
from fedproxy.federation.engines import Answer, Dropped
from fedproxy.federation.server.checkpoint import CheckpointFolder, Progress
from fedproxy.federation.server.collecting import assemble
from fedproxy.federation.server.expected import Expected
from fedproxy.federation.server.loop import Federation
from fedproxy.federation.server.participation import Participation
from fedproxy.files import write_text
from fedproxy.interrupts import check_interrupt
from fedproxy.models import Decoder, LayerMap, load_model, load_tokenizer, placed, save_model
from fedproxy.models.decoder import disclosed_count, parameter_count, positions_limit
from fedproxy.models.probing import check_packing, check_target
from fedproxy.modules.devices import ClientDevices, one_device
from fedproxy.pipeline.data import public_texts, text_batches
from fedproxy.pipeline.display import Bar, Display
from fedproxy.pipeline.folder import RunFolder
from fedproxy.pipeline.inputs import run_key
from fedproxy.pipeline.loggers import RunLoggers
from fedproxy.pipeline.realignment import aligner
from fedproxy.pipeline.validation import round_validation
from fedproxy.reporting import model_card
from fedproxy.sealed import RESTART, check_tree, read_sealed, tree_sha256, without_tree, write_sealed
from fedproxy.seeding import generator
from fedproxy.strategies.compression.base import Batch
from fedproxy.strategies.round_parts import Rules, parts_of
from fedproxy.strategies.round_parts.emulator import Emulator
from fedproxy.strategies.trainable.base import Trainable, TrainableModel

if TYPE_CHECKING:
    from fedproxy.pipeline.sharing import SharedWork

LAYER_MAP = "server/layer_map.json"
UNDISTILLED = "server/proxy_undistilled"
"""Paths in a run's folder, by which hashes are noted."""


@dataclass
class Run:
    """What the stages of one run share."""

    config: RunConfig
    folder: RunFolder
    display: Display
    shared: "SharedWork | None" = None
    """Work of other runs that this one may take over; None does everything itself."""

    def __post_init__(self) -> None:
        self._target: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None
        self.loggers = RunLoggers(self.config.loggers, self.folder.root, to_dict(self.config))

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What is known for the report; read when first asked for, which is after an older run was deleted."""
        return read_sealed(self._facts_file) or self._first_facts()

    @property
    def _facts_file(self) -> Path:
        return self.folder.server / "facts.json"

    def note(self, **facts: Any) -> None:
        """Keep facts for the report, on disk, so that a continued run knows them too."""
        self.facts.update(facts)
        write_sealed(self._facts_file, self.facts)

    def warn(self, line: str) -> None:
        """Show a line and keep it for the report's notes."""
        self.display.say(line)
        self.note(warnings=[*self.facts.get("warnings", []), line])

    def keep(self, *names: str) -> None:
        """Note the hashes of all files below these files and folders of the run, as they are now."""
        others = without_tree(self.facts.get("files", {}), *names)
        self.note(files={**others, **tree_sha256(self.folder.root, *names)})

    def verify(self, *names: str) -> None:
        """Compare these files and folders of the run with what :meth:`keep` noted.

        Raises:
            CheckpointError: Naming the first file that differs.
        """
        check_tree(self.folder.root, self.facts.get("files", {}), *names)

    def layer_map(self) -> LayerMap:
        """Return the layer map, as it was written.

        Raises:
            CheckpointError: If the file is missing or damaged.
        """
        self.verify(LAYER_MAP)
        return LayerMap.load(self.folder.layer_map)

    def checkpoints(self) -> CheckpointFolder:
        """Return the run's checkpoints; it has a proxy."""
        return CheckpointFolder(self.folder.checkpoints, run=run_key(self))

    def _first_facts(self) -> dict[str, Any]:
        if self.folder.layer_map.exists() or CheckpointFolder(self.folder.checkpoints).rounds():
            raise CheckpointError(f"{self._facts_file} is missing, and with it what the run began with; {RESTART}")
        return {"seconds": {}, "started": datetime.now(UTC).isoformat(timespec="seconds")}

    def note_seconds(self, stage: str, seconds: float) -> None:
        """Keep a finished stage's wall time."""
        self.note(seconds={**self.facts["seconds"], stage: seconds})

    @property
    def device(self) -> torch.device:
        """Where forward passes outside of training run: on the accelerator, unless the trainer stays on the CPU."""
        found = torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cpu") if found is None or self.config.trainer.get("accelerator") == "cpu" else found

    def target(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Return the target and its tokenizer, loaded when first asked for."""
        if self._target is None:
            path = resolve(self.config.target.path) or self.config.target.path
            self._target = load_model(path, dtype=self.config.target.dtype), load_tokenizer(path)
        return self._target


def compress(run: Run, clients: ClientRows) -> None:
    """Stage (i): write ``proxy/`` and, last, the server's layer map.

    Raises:
        DataError: If there is too little public text; nothing is compressed then.
    """
    if run.folder.layer_map.is_file():
        run.verify("proxy", UNDISTILLED, LAYER_MAP)
        return
    config, started = run.config, time.perf_counter()
    calibration, healing, distillation = config.compression.calibration, config.healing, config.distillation
    texts, cases, lessons = (
        public_texts(calibration, clients.owned, rows=rows, seed=config.seed) if rows else []
        for rows in (calibration.rows, healing.rows, distillation.rows if distillation.steps else 0)
    )
    target, tokenizer = run.target()
    batches = text_batches(texts, tokenizer, max_tokens=positions_limit(target, calibration.max_tokens))
    with run.display.bar("reading calibration text", len(batches)) as bar, placed(target, run.device):
        check_target(target)
        if config.client.packing and config.federation.rounds:
            check_packing(target)
        scores = config.compression.score(Decoder.of(target), _stepped(batches, bar))
    proxy, layer_map = config.compression.build(target, scores)
    depth, shown = len(Decoder.of(target)), config.compression.block_scores(len(Decoder.of(target)), scores)
    run.display.say(f"compressed: {describe(layer_map, depth)} ({config.compression.name})")
    if healing.rows:
        heal(run, proxy, layer_map, cases)
    compressed = time.perf_counter()
    if distillation.steps:
        # Kept by the server, so that what distillation and what tuning changed can be told apart later.
        save_model(proxy, tokenizer, run.folder.undistilled, card=model_card("proxy", {}), anonymous=True)
        distil(run, proxy, layer_map, lessons)
    run.note(
        target_parameters=parameter_count(target),
        proxy_parameters=parameter_count(proxy),
        disclosed_parameters=disclosed_count(proxy, layer_map),
        target_sha256=layer_map.target_sha256,
        block_scores=None if shown is None else shown.tolist(),
    )
    run.note_seconds("compression", compressed - started)
    run.note_seconds("distillation", time.perf_counter() - compressed)
    card = model_card("proxy", {}, parameters=run.facts["proxy_parameters"])
    save_model(proxy, tokenizer, run.folder.proxy, card=card, anonymous=True)
    run.facts.pop("key", None)  # of rounds on an earlier proxy
    run.keep("proxy", UNDISTILLED)
    text = layer_map.to_json()
    run.note(files={**run.facts["files"], LAYER_MAP: hashlib.sha256(text.encode()).hexdigest()})
    write_text(run.folder.layer_map, text)  # last: its presence says that all is there


def describe(layer_map: LayerMap, depth: int) -> str:
    """Return in words what of a target of ``depth`` blocks is in the proxy."""
    words = f"{len(layer_map.centres)} of {depth} blocks kept"
    if len(layer_map.centres) < len(layer_map.proxy_to_target):
        words += f", in {len(layer_map.proxy_to_target)} places"
    return words if layer_map.neurons is None else f"{words}, {len(layer_map.neurons[0])} neurons in each"


def heal(run: Run, proxy: PreTrainedModel, layer_map: LayerMap, texts: Sequence[str]) -> None:
    """Fit the blocks before the proxy's gaps to the target on public texts, in place."""
    from fedproxy.strategies.compression.healing import heal as fit

    target, tokenizer = run.target()
    limit = positions_limit(target, run.config.compression.calibration.max_tokens)
    with placed(target, run.device), placed(proxy, run.device):
        found = fit(
            proxy,
            target,
            text_batches(texts, tokenizer, max_tokens=limit),
            layer_map=layer_map,
            ridge=run.config.healing.ridge,
        )
    errors = ", ".join(
        f"block {gap.block} ({gap.removed} removed) {gap.before:.3f} to {gap.after:.3f}" for gap in found
    )
    run.display.say(
        f"healed: error of hidden states behind {errors}" if found else "healed: no block has a gap behind it"
    )


def distil(run: Run, proxy: PreTrainedModel, layer_map: LayerMap, texts: Sequence[str]) -> None:
    """Distil the target into the proxy on public texts, in place."""
    from fedproxy.modules.distillation import distil as fit

    settings = run.config.distillation
    target, tokenizer = run.target()
    limit = positions_limit(target, run.config.compression.calibration.max_tokens)
    batches = text_batches(texts, tokenizer, max_tokens=limit, batch_size=settings.batch_size)
    loss = fit(
        proxy,
        target,
        batches,
        settings=settings,
        layer_map=layer_map,
        trainer=one_device(run.config.trainer),
        generator=generator(run.config.seed, "distillation"),
        cache=cache_root() / "teacher",
        logs=run.folder.trainer_logs / "distillation",
    )
    run.display.say(f"distilled: {settings.steps} steps, loss {loss:.3f}")


def federate(run: Run, clients: ClientRows, questions: Sequence[Question] = ()) -> tuple[TrainableModel, Progress]:
    """Stage (ii): run the rounds that are left and return the proxy, its trained parts still in it.

    Args:
        run: The run.
        clients: The clients, with their numbers of rows.
        questions: Held-out rows to score the state on between rounds, where the recipe asks for it.

    Returns:
        The proxy in its final state, or that of the best round, and the progress that it has.
    """
    config = run.config
    proxy, tokenizer = _load_proxy(run)
    trainable = config.trainable.placed(run.layer_map())
    model = trainable.attach(proxy, generator(config.seed, "trainable"))
    checkpoints, store = run.checkpoints(), ClientStore(run.folder.checkpoints)

    def check(progress: Progress) -> None:
        _check_state(progress.state, model, checkpoints)
        store.check(progress.client_files)

    progress = checkpoints.load_latest(check, run.warn) or Progress(0, model.state())
    if progress.round:
        run.display.say(f"going on after round {progress.round}")
    store.rewind(progress.round)
    run.note(trainable_parameters=model.num_parameters)
    setup = _local_setup(run, trainable)
    aligns = aligner(run, model, clients.owned)
    rules = Rules(config.aggregator, config.regularizer, config.realignment, model, config.parts.values())
    parts = tuple(replace(part, aligner=aligns) if isinstance(part, Emulator) else part for part in parts_of(rules))
    federation = Federation(
        clients=sorted(clients),
        clients_per_round=config.federation.clients_per_round,
        aggregator=config.aggregator,
        server_optimizer=config.server_optimizer,
        job=_job(config),
        parts=parts,
        lora_scaling=config.trainable.lora_scaling,
        seed=config.seed,
        store=store,
        space=config.federation.space,
        validation=round_validation(run, model, tokenizer, questions),
        participation=Participation(
            config.federation.min_clients,
            config.federation.round_timeout_s,
            config.federation.max_norm_ratio,
            Expected.from_parts(parts, model, rows=clients, target_tokens=config.data.max_target_tokens),
            folder=run.folder.server,
        ),
        client_processes=ClientDevices.of(config.trainer).count,
        rows=clients if config.federation.sampling == "weighted" else None,
    )
    left = config.federation.rounds - progress.round
    run.loggers.rounds(progress.records)
    engine = config.engine.start(
        lambda: setup.client(model, tokenizer), setup.remote(config.plugins), run.folder.exchange
    )
    clients_left = left * federation.clients_in_round
    with closing(engine), run.display.warnings(), run.display.bar("clients", clients_left) as bar:

        def on_round(record: Mapping[str, Any]) -> None:
            run.display.round(record, config.federation.rounds)
            run.loggers.rounds([record])

        def on_client(number: int, answer: Answer) -> None:
            check_interrupt()
            bar.step(f"round {number}: {answer.client_id}")
            if isinstance(answer, Dropped):
                run.display.say(f"round {number}: client {answer.client_id!r} is dropped: {answer.reason}")

        progress = federation.run(
            progress,
            config.federation.rounds,
            engine,
            checkpoints=checkpoints,
            journal=run.folder.journal,
            on_round=on_round,
            on_client=on_client,
        )
    if federation.validation is not None:
        progress = federation.validation.chosen(progress, checkpoints)
    if progress.round < config.federation.rounds:
        run.display.say(f"round {progress.round} is the best on held-out rows: its state is fused")
    if aligns is not None:
        aligns.restore()
    if config.aggregator.aggregates:
        run.note(collected_bytes=assemble(model, progress, config.aggregator, store, federation.clients))
    return model, progress


def _load_proxy(run: Run) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the proxy and its tokenizer, the proxy fit for what clients do with its rows."""
    proxy = load_model(run.folder.proxy, dtype=run.config.target.dtype)
    if run.config.client.packing:
        check_packing(proxy)
    return proxy, load_tokenizer(run.folder.proxy)


def _job(config: RunConfig) -> dict[str, Any]:
    settings = to_dict(config.client)
    del settings["quantization"]  # of how a client is made, not of a round
    return {**settings, "regularizer": to_dict(config.regularizer), "rounds": config.federation.rounds}


def _local_setup(run: Run, trainable: Trainable) -> LocalSetup:
    """Return what clients are made from, and say how several devices share their batches."""
    config = run.config
    devices = ClientDevices.of(config.trainer)
    if devices.count > 1:
        run.display.say(devices.describe(config.client.batch_size))
    run.folder.clear_exchange()  # what a killed run left
    return LocalSetup(
        proxy=str(run.folder.proxy.absolute()),
        dtype=config.target.dtype,
        trainable=to_dict(trainable),
        rows=str(run.folder.rows.absolute()),
        store=str(run.folder.checkpoints.absolute()),
        max_input_tokens=config.data.max_input_tokens,
        max_target_tokens=config.data.max_target_tokens,
        trainer=config.trainer,
        quantization=config.client.quantization,
        plugins=config.plugins,
        scratch=str(run.folder.exchange.absolute()),
        logs=str(run.folder.trainer_logs.absolute()),
    )


def _check_state(state: Mapping[str, Tensor], model: TrainableModel, checkpoints: CheckpointFolder) -> None:
    wanted = model.parameters()
    for name, parameter in wanted.items():
        if name not in state or state[name].shape != parameter.shape:
            raise CheckpointError(
                f"the checkpoint in {checkpoints.folder} has no tensor {name} of shape {tuple(parameter.shape)}"
            )


def _stepped(batches: Iterable[Batch], bar: Bar) -> Iterator[Batch]:
    """Pass batches on and move the bar with each."""
    for batch in batches:
        yield batch
        bar.step()
