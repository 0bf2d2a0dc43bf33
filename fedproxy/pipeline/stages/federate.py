"""Stage (ii): the rounds."""

from collections.abc import Container, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

from torch import Tensor

from fedproxy.config import RunConfig, to_dict
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
from fedproxy.interrupts import check_interrupt
from fedproxy.models import load_model, load_tokenizer
from fedproxy.models.decoder import positions_limit
from fedproxy.modules.devices import ClientDevices, one_device
from fedproxy.pipeline.context import Run
from fedproxy.pipeline.data import public_texts, text_batches
from fedproxy.pipeline.validation import round_validation
from fedproxy.seeding import generator
from fedproxy.strategies.realignment import Material
from fedproxy.strategies.round_parts import Rules, parts_of
from fedproxy.strategies.round_parts.emulator import Aligner, Emulator
from fedproxy.strategies.trainable.base import Trainable, TrainableModel


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
    proxy, tokenizer = load_model(run.folder.proxy, dtype=config.target.dtype), load_tokenizer(run.folder.proxy)
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


def _job(config: RunConfig) -> dict[str, Any]:
    settings = to_dict(config.client)
    del settings["quantization"]  # of how a client is made, not of a round
    return {**settings, "regularizer": to_dict(config.regularizer)}


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


def aligner(run: Run, model: TrainableModel, owned: Container[str]) -> Aligner | None:
    """Return what aligns the proxy before every broadcast, or None where the recipe asks for nothing."""
    config = run.config
    rows, batch_size = config.realignment.reads
    if not rows:
        return None
    target, tokenizer = run.target()
    calibration = config.compression.calibration
    texts = public_texts(calibration, owned, rows=rows, seed=config.seed)
    limit = positions_limit(target, calibration.max_tokens)
    material = Material(
        target=target,
        layer_map=run.layer_map(),
        batches=text_batches(texts, tokenizer, max_tokens=limit, batch_size=batch_size),
        trainer=one_device(config.trainer),
        logs=run.folder.trainer_logs / "realignment",
    )
    return Aligner(config.realignment, model, material, seed=config.seed)
