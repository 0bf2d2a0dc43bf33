"""The stages of a run. Each skips what its folder already holds whole, so that a killed run goes on where it was."""

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedproxy.config import RunConfig, to_dict
from fedproxy.data.assets import resolve
from fedproxy.errors import CheckpointError
from fedproxy.federation.checkpoint import CheckpointFolder, Progress
from fedproxy.federation.client_rows import ClientRows
from fedproxy.federation.engines import Answer, Dropped
from fedproxy.federation.local_client import LocalSetup
from fedproxy.federation.loop import Federation
from fedproxy.federation.participation import Participation
from fedproxy.models import Decoder, LayerMap, load_model, load_tokenizer, placed, save_model
from fedproxy.models.decoder import parameter_count, set_weights, share_weights
from fedproxy.pipeline.data import public_texts, text_batches
from fedproxy.pipeline.display import Bar, Display
from fedproxy.pipeline.folder import RunFolder, read_json
from fedproxy.pipeline.loggers import log_round, round_loggers
from fedproxy.plain_json import write_json
from fedproxy.reporting import model_card
from fedproxy.seeding import generator
from fedproxy.strategies.compression.base import Batch
from fedproxy.strategies.trainable.base import TrainableModel


@dataclass
class Run:
    """What the stages of one run share."""

    config: RunConfig
    folder: RunFolder
    display: Display

    def __post_init__(self) -> None:
        self._facts = self.folder.server / "facts.json"
        self.facts: dict[str, Any] = read_json(self._facts) or {"seconds": {}}
        self._target: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None

    def note(self, **facts: Any) -> None:
        """Keep facts for the report, on disk, so that a continued run knows them too."""
        self.facts |= facts
        write_json(self._facts, self.facts)

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


def one_device(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Return Trainer options in which ``devices: auto`` is one device, whatever the machine has."""
    devices = trainer.get("devices", "auto")
    return {**trainer, "devices": 1 if devices == "auto" else devices}


def compress(run: Run, clients: ClientRows) -> None:
    """Stage (i): write ``proxy/`` and, last, the server's layer map."""
    if run.folder.layer_map.is_file():
        return
    config, started = run.config, time.perf_counter()
    target, tokenizer = run.target()
    calibration = config.compression.calibration
    texts = public_texts(calibration, clients, rows=calibration.rows, seed=config.seed)
    batches = text_batches(texts, tokenizer, max_tokens=_limit(target, calibration.max_tokens))
    with run.display.bar("reading calibration text", len(batches)) as bar, placed(target, run.device):
        scores = config.compression.score(Decoder.of(target), _stepped(batches, bar))
    proxy, layer_map = config.compression.build(target, scores)
    kept = len(layer_map.proxy_to_target)
    run.display.say(f"compressed: {kept} of {len(Decoder.of(target))} blocks kept ({config.compression.name})")
    compressed = time.perf_counter()
    if config.distillation.steps:
        distil(run, proxy, layer_map, clients)
    run.note(
        target_parameters=parameter_count(target),
        proxy_parameters=parameter_count(proxy),
        target_sha256=layer_map.target_sha256,
        block_scores=None if scores is None else scores.tolist(),
    )
    run.note_seconds("compression", compressed - started)
    run.note_seconds("distillation", time.perf_counter() - compressed)
    card = model_card("proxy", {}, parameters=run.facts["proxy_parameters"])
    save_model(proxy, tokenizer, run.folder.proxy, card=card, anonymous=True)
    layer_map.save(run.folder.layer_map)


def distil(run: Run, proxy: PreTrainedModel, layer_map: LayerMap, clients: ClientRows) -> None:
    """Distil the target into the proxy on public text, in place."""
    from fedproxy.modules.distillation import distil as fit

    settings = run.config.distillation
    calibration = run.config.compression.calibration
    target, tokenizer = run.target()
    texts = public_texts(calibration, clients, rows=settings.rows, seed=run.config.seed)
    limit = _limit(target, calibration.max_tokens)
    batches = text_batches(texts, tokenizer, max_tokens=limit, batch_size=settings.batch_size)
    with placed(target, run.device):
        loss = fit(
            proxy,
            target,
            batches,
            settings=settings,
            layer_map=layer_map,
            trainer=one_device(run.config.trainer),
            generator=generator(run.config.seed, "distillation"),
        )
    run.display.say(f"distilled: {settings.steps} steps, loss {loss:.3f}")


def federate(run: Run, clients: ClientRows) -> tuple[TrainableModel, Progress]:
    """Stage (ii): run the rounds that are left and return the proxy in its final state."""
    config = run.config
    proxy, tokenizer = load_model(run.folder.proxy, dtype=config.target.dtype), load_tokenizer(run.folder.proxy)
    model = config.trainable.attach(proxy, generator(config.seed, "trainable"))
    checkpoints = CheckpointFolder(run.folder.checkpoints)
    progress = checkpoints.load_latest() or Progress(0, model.state())
    _check_state(progress.state, model, checkpoints)
    if progress.round:
        run.display.say(f"going on after round {progress.round}")
    run.note(trainable_parameters=model.num_parameters)
    setup = _local_setup(run)
    engine = config.engine.start(
        lambda: setup.client(model, tokenizer), setup.remote(config.plugins), run.folder.exchange
    )
    federation = Federation(
        clients=sorted(clients),
        clients_per_round=config.federation.clients_per_round,
        aggregator=config.aggregator,
        server_optimizer=config.server_optimizer,
        job=_job(config),
        send_conflict=config.regularizer.needs_conflict,
        lora_scaling=config.trainable.lora_scaling,
        seed=config.seed,
        space=config.federation.space,
        participation=Participation(
            config.federation.min_clients, config.federation.round_timeout_s, config.federation.max_norm_ratio
        ),
        rows=clients.sizes if config.federation.sampling == "weighted" else None,
    )
    left = config.federation.rounds - progress.round
    loggers = round_loggers(config.loggers, run.folder.root)
    with run.display.bar("clients", left * federation.clients_in_round) as bar:

        def on_round(record: Mapping[str, Any]) -> None:
            run.display.round(record, config.federation.rounds)
            log_round(loggers, record)

        def on_client(number: int, answer: Answer) -> None:
            bar.step(f"round {number}: {answer.client_id}")
            if isinstance(answer, Dropped):
                run.display.say(f"round {number}: client {answer.client_id!r} is dropped: {answer.reason}")

        try:
            progress = federation.run(
                progress,
                config.federation.rounds,
                engine,
                checkpoints=checkpoints,
                journal=run.folder.journal,
                on_round=on_round,
                on_client=on_client,
            )
        finally:
            engine.close()
    model.load_state(progress.state)
    return model, progress


@dataclass
class TunedProxy:
    """The proxy after federation, taken apart: weights as broadcast, and those that tuning changed."""

    proxy: PreTrainedModel
    """The plain proxy as broadcast."""
    merged: dict[str, Tensor]
    """Changed weights, LoRA merged, float32, by their name in the plain proxy."""

    def model(self) -> PreTrainedModel:
        """Return the tuned proxy as a plain model in the proxy's dtype; it shares unchanged weights."""
        tuned = share_weights(self.proxy)
        set_weights(tuned, {name: weight.to(self.proxy.dtype) for name, weight in self.merged.items()})
        return tuned


def fuse(run: Run, model: TrainableModel, rounds: int) -> TunedProxy:
    """Stage (iii): write ``adapter/`` and ``fused/``, once per round count, and return the tuned proxy."""
    started = time.perf_counter()
    done = run.facts.get("fused_after_round") == rounds and run.folder.fused.is_dir()
    if not done:
        model.save_adapter(run.folder.adapter)
    merged = dict(model.merged_weights())
    tuned = TunedProxy(model.detach(), merged)
    if done:
        return tuned
    target, tokenizer = run.target()
    before = tuned.proxy.state_dict()
    fused = run.config.fusion.fuse(target, before, {**before, **merged}, LayerMap.load(run.folder.layer_map))
    card = model_card("fused", {}, method=run.config.method, parameters=run.facts["target_parameters"])
    save_model(fused, tokenizer, run.folder.fused, card=card)
    run.note(fused_after_round=rounds)
    run.note_seconds("fusion", time.perf_counter() - started)
    return tuned


def _job(config: RunConfig) -> dict[str, Any]:
    return {"seed": config.seed, **to_dict(config.client), "regularizer": to_dict(config.regularizer)}


def _local_setup(run: Run) -> LocalSetup:
    config = run.config
    return LocalSetup(
        proxy=str(run.folder.proxy.absolute()),
        dtype=config.target.dtype,
        trainable=to_dict(config.trainable),
        rows=str(run.folder.rows.absolute()),
        max_input_tokens=config.data.max_input_tokens,
        max_target_tokens=config.data.max_target_tokens,
        trainer=one_device(config.trainer),
    )


def _check_state(state: Mapping[str, Tensor], model: TrainableModel, checkpoints: CheckpointFolder) -> None:
    wanted = model.parameters()
    for name, parameter in wanted.items():
        if name not in state or state[name].shape != parameter.shape:
            raise CheckpointError(
                f"the checkpoint in {checkpoints.folder} has no tensor {name} of shape {tuple(parameter.shape)}; "
                f"start again with overwrite=true"
            )


def _stepped(batches: Iterable[Batch], bar: Bar) -> Iterator[Batch]:
    """Pass batches on and move the bar with each."""
    for batch in batches:
        yield batch
        bar.step()


def _limit(model: PreTrainedModel, wanted: int) -> int:
    """Return the longest text that both the recipe and the model's positions allow."""
    return min(wanted, getattr(model.config.get_text_config(), "max_position_embeddings", wanted) or wanted)
