"""Stage (ii): the rounds."""

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fedproxy.config import RunConfig, to_dict
from fedproxy.data.partition.rows import ClientRows
from fedproxy.errors import CAUSE_HINT, LOG_NAME, CheckpointError, shows_causes
from fedproxy.federation.client.log import last_entry
from fedproxy.federation.client.setup import LocalSetup
from fedproxy.federation.server.asking import assemble, greet, introduced, rewind, score
from fedproxy.federation.server.checkpoint import CheckpointFolder, Progress
from fedproxy.federation.server.expected import Expected
from fedproxy.federation.server.files import ServerFiles
from fedproxy.federation.server.loop import Federation, write_journal
from fedproxy.federation.server.participation import Participation
from fedproxy.interrupts import check_interrupt
from fedproxy.messages import Answer, Dropped, Facts, Sites
from fedproxy.models import load_tokenizer
from fedproxy.models.decoder import positions_limit
from fedproxy.models.logit_offset import require_same_vocabulary
from fedproxy.models.probing import check_packing
from fedproxy.modules.devices import ClientDevices, one_device
from fedproxy.pipeline.context import Run
from fedproxy.pipeline.data import public_texts, text_batches
from fedproxy.pipeline.display import Bar
from fedproxy.pipeline.privacy import ledger_folder, privacy_parts
from fedproxy.pipeline.reads import FEDERATE, MAY_CHANGE
from fedproxy.pipeline.stage import Stage
from fedproxy.pipeline.stages.compress import Compress
from fedproxy.pipeline.validation import round_validation
from fedproxy.privacy.registration import FOLDER as SIGNING
from fedproxy.privacy.registration import register_all, registered
from fedproxy.privacy.server_noise import ServerNoise
from fedproxy.protocol import Tensors
from fedproxy.reporting.at_sites import SiteScores
from fedproxy.sealed import content_sha256
from fedproxy.seeding import generator
from fedproxy.strategies.realignment import Material
from fedproxy.strategies.round_parts import RoundPart, Rules, parts_of
from fedproxy.strategies.round_parts.emulator import Aligner, Emulator
from fedproxy.strategies.round_parts.privacy import Privacy
from fedproxy.strategies.trainable.base import Trainable, TrainableModel


class Federate(Stage):
    """The rounds; a checkpoint after each of them says how far they are."""

    name, past = "federate", "federated"
    reads, after = FEDERATE, (Compress,)
    outputs = ("rounds.jsonl", "checkpoints")

    def __init__(self) -> None:
        self._rounds: _Rounds | None = None

    def check(self, run: Run) -> None:
        """Refuse, before any client trains, a fusion that adds logits over two vocabularies.

        Raises:
            ModelError: Naming a token that differs.
        """
        if run.config.fusion.adds_logits:
            target, proxy = load_tokenizer(run.target_path), load_tokenizer(run.folder.proxy)
            require_same_vocabulary(target.get_vocab(), proxy.get_vocab())

    def texts(self, config: RunConfig) -> tuple[int, ...]:
        """Return how many texts the server aligns the proxy with."""
        return (config.realignment.reads[0],)

    def may_be_shared(self, run: Run) -> bool:
        """Return whether equal rounds give the same: not if inputs changed in between, or scores count."""
        config = run.config.federation
        scored = config.validation.select == "best" or config.validation.evaluator is not None
        return bool(config.rounds) and not run.facts.changes and not scored and not run.config.engine.at_sites

    def whole(self, run: Run) -> bool:
        """Return whether the last checkpoint that is whole has all rounds."""
        if run.config.federation.rounds and not checkpoints(run).rounds():
            return False  # an equal run may have some
        self._rounds = _Rounds.begin(run)
        return self._rounds.progress.round == run.config.federation.rounds

    def seal(self, run: Run) -> None:
        """Leave it to the checkpoints, which carry hashes of their own."""

    def do(self, run: Run) -> None:
        """Run the rounds that are left."""
        rounds = self._rounds = self._rounds or _Rounds.begin(run)
        federation, config = rounds.federation, run.config
        clients = (config.federation.rounds - rounds.progress.round) * federation.clients_in_round
        if not clients:
            return
        _next_round(run, federation, rounds.progress.round)
        with run.display.warnings(), run.display.bar("clients", clients) as bar, _closed_on_error(rounds.sites):
            rounds.sites.working = lambda number, client, share: bar.share(f"round {number}: {client}", client, share)
            rounds.progress = federation.run(
                rounds.progress,
                config.federation.rounds,
                rounds.sites,
                checkpoints=checkpoints(run),
                journal=run.folder.journal,
                on_round=partial(_on_round, run, federation),
                on_client=partial(_on_client, run, bar),
            )

    def load(self, run: Run) -> None:
        """Put the proxy in its final state, or that of the best round, into ``run.trained``."""
        rounds = self._rounds or _Rounds.begin(run)
        with closing(rounds.sites):
            progress = rounds.finished(run)
            run.trained = rounds.model, progress
            rounds.score_at_sites(run, progress)


def checkpoints(run: Run) -> CheckpointFolder:
    """Return the run's checkpoints, which know its settings, rows and proxy; it has a proxy."""
    origin = run.facts.origin
    inputs = Federate().inputs(
        run,
        lambda name: origin.get(name) if name == "data" else None,
        lambda stage: stage.made(run),
        without=MAY_CHANGE,
    )
    return CheckpointFolder(run.folder.checkpoints, run=content_sha256(inputs))


@dataclass
class _Rounds:
    """The federation of a run and how far it is."""

    federation: Federation
    model: TrainableModel
    sites: Sites
    """The clients, who stay until the run has their last tensors."""
    aligns: Aligner | None
    progress: Progress
    facts: Mapping[str, Facts]
    """What clients at real sites said of themselves; empty in a simulation."""
    initial: Tensors
    """The state that the rounds began with."""

    @classmethod
    def begin(cls, run: Run) -> "_Rounds":
        """Go on from the last whole checkpoint, or from the proxy as it was made."""
        config = run.config
        proxy, tokenizer = run.proxy(), load_tokenizer(run.folder.proxy)
        if config.client.packing:
            check_packing(proxy)
        trainable = config.trainable.placed(run.layer_map)
        model = trainable.attach(proxy, generator(config.seed, "trainable"))
        initial = model.state() if config.engine.at_sites else {}
        setup = _local_setup(run, trainable)
        sites = config.engine.start(
            lambda: setup.client(model, tokenizer), setup.remote(config.plugins), run.folder.exchange
        )
        with _closed_on_error(sites):
            files = ServerFiles(run.folder.checkpoints)
            progress = _last_progress(run, model, sites, files)
            run.note(trainable_parameters=model.num_parameters)
            run.loggers.rounds(progress.records)
            aligns = aligner(run, model, run.clients.owned)
            facts = greet(sites, sorted(run.clients)) if config.engine.at_sites else {}
            federation = _federation(run, model, tokenizer, files, aligns, facts)
        return cls(federation, model, sites, aligns, progress, facts, initial)

    def finished(self, run: Run) -> Progress:
        """Bring the model to its final state and return the progress that this is."""
        progress, federation = self.progress, self.federation
        if federation.validation is not None:
            progress = federation.validation.chosen(progress, checkpoints(run))
        if progress.round < run.config.federation.rounds:
            run.display.say(f"round {progress.round} is the best on held-out rows: its state is fused")
        if self.aligns is not None:
            self.aligns.restore()
        if federation.aggregator.aggregates:
            handed = assemble(
                self.model, progress, federation.aggregator, federation.files, self.sites, folder=run.folder.server
            )
            run.note(collected_bytes=handed)
        return progress

    def score_at_sites(self, run: Run, progress: Progress) -> None:
        """Have clients at real sites score the proxy on rows that they hold back, where that is one model for all.

        Under privacy nobody is asked: such scores are not accounted for.
        """
        rule, privacy = self.federation.aggregator, run.config.privacy
        own = sorted(client for client, said in self.facts.items() if said.held_out)
        moved = not rule.aggregates or "base_change" in rule.parts or self.aligns is not None
        known = run.facts.at_sites
        if not own or moved or privacy.on or privacy.secure_aggregation:
            return
        if known is not None and known["after_round"] == progress.round:
            return
        tuned = {name: tensor for name, tensor in progress.state.items() if rule.shares(name)}
        sums, missing = score(self.sites, progress, {"proxy": self.initial, "proxy_tuned": tuned}, own)
        means = {
            state: {metric: total / count for metric, (total, count) in found.items()} for state, found in sums.items()
        }
        answered = [client for client in own if client not in missing]
        found = SiteScores(
            clients=len(answered),
            rows=sum(self.facts[client].held_out for client in answered),
            after_round=progress.round,
            scores={state: found for state, found in means.items() if found},
            missing=missing,
        )
        run.note(at_sites=asdict(found))


@contextmanager
def _closed_on_error(sites: Sites) -> Iterator[None]:
    """Let the clients go where something ends the work with them early."""
    try:
        yield
    except BaseException:
        sites.close()
        raise


def _last_progress(run: Run, model: TrainableModel, sites: Sites, files: ServerFiles) -> Progress:
    """Return the progress of the last whole checkpoint that clients, too, can go back to; bring everybody there."""
    saved = checkpoints(run)

    def check(progress: Progress) -> None:
        _check_state(progress.state, model, saved)
        files.check(progress.files)
        rewind(sites, progress, sorted(run.clients))

    progress = saved.load_latest(check, run.warn) or Progress(0, model.state())
    if progress.round:
        run.display.say(f"going on after round {progress.round}")
    files.rewind(progress.round)
    write_journal(run.folder.journal, progress.records)
    return progress


def _federation(
    run: Run,
    model: TrainableModel,
    tokenizer: PreTrainedTokenizerBase,
    files: ServerFiles,
    aligns: Aligner | None,
    facts: Mapping[str, Facts],
) -> Federation:
    """Return the server's side of the rounds, as the recipe has it."""
    config, clients = run.config, run.clients
    added = [*config.parts.values(), *privacy_parts(config, clients, checkpoints(run).run)]
    rules = Rules(config.aggregator, config.regularizer, config.realignment, model, added)
    parts = tuple(_bound(run, part, aligns) for part in parts_of(rules))
    return Federation(
        clients=sorted(clients),
        clients_per_round=config.federation.clients_per_round,
        aggregator=config.aggregator,
        server_optimizer=config.server_optimizer,
        job=_job(config),
        parts=parts,
        lora_scaling=config.trainable.lora_scaling,
        seed=config.seed,
        files=files,
        space=config.federation.space,
        validation=round_validation(run, model, tokenizer, run.questions),
        participation=Participation(
            config.federation.min_clients,
            config.federation.round_timeout_s,
            config.federation.max_norm_ratio,
            _expected(run, parts, model, facts),
            folder=run.folder.server,
        ),
        registered=_registered(run),
        client_processes=ClientDevices.of(config.trainer).count,
        rows=clients if config.federation.sampling == "weighted" else None,
    )


def _bound(run: Run, part: RoundPart, aligns: Aligner | None) -> RoundPart:
    """Return a part with what the server alone gives it."""
    if isinstance(part, Emulator):
        return replace(part, aligner=aligns)
    if isinstance(part, Privacy):
        return replace(part, noise=ServerNoise(run.folder.checkpoints / "server_noise.json"))
    return part


def _registered(run: Run) -> Mapping[str, bytes]:
    """Return the clients' signing keys as far as the server knows them: at real sites, what the recipe says."""
    if not run.config.privacy.secure_aggregation:
        return {}
    if run.config.engine.at_sites:
        return {client: bytes.fromhex(key) for client, key in run.config.privacy.peers.items()}
    return registered(run.folder.rows / SIGNING)


def _expected(run: Run, parts: Sequence[RoundPart], model: TrainableModel, facts: Mapping[str, Facts]) -> Expected:
    """Return what the server knows of updates: no counts where they are withheld, no values where they are masked.

    Of rows that lie at real sites it knows what they said of them.
    """
    privacy, clients = run.config.privacy, run.clients
    withheld = privacy.on or privacy.secure_aggregation
    rows, targets = None if withheld or facts else clients, _most_targets(run.config, clients)
    expected = Expected.from_parts(parts, model, rows=rows, target_tokens=targets, withheld=withheld)
    return expected if withheld or not facts else introduced(expected, facts)


def _next_round(run: Run, federation: Federation, done: int) -> None:
    run.now.round(done + 1, run.config.federation.rounds, federation.chosen(done + 1))


def _on_round(run: Run, federation: Federation, record: Mapping[str, Any]) -> None:
    run.display.round(record, run.config.federation.rounds)
    run.loggers.rounds([record])
    if record["round"] < run.config.federation.rounds:
        _next_round(run, federation, record["round"])


def _on_client(run: Run, bar: Bar, number: int, answer: Answer) -> None:
    check_interrupt()
    bar.step(f"round {number}: {answer.client_id}", answer.client_id)
    run.now.client(answer.client_id, answer.reason if isinstance(answer, Dropped) else None)
    if isinstance(answer, Dropped):
        hint = f" ({CAUSE_HINT})" if LOG_NAME.search(answer.reason) and not shows_causes() else ""
        run.display.say(f"round {number}: client {answer.client_id!r} is dropped: {answer.reason}{hint}")
        if shows_causes() and (cause := last_entry(answer.reason, run.folder.root)):
            run.display.say(cause)


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
    signing = run.folder.rows / SIGNING
    if config.privacy.secure_aggregation and not config.engine.at_sites:
        register_all(signing, run.clients)
    return LocalSetup(
        proxy=str(run.folder.proxy.absolute()),
        dtype=config.target.dtype,
        trainable=to_dict(trainable),
        rows=str(run.folder.rows.absolute()),
        store=str(run.folder.checkpoints.absolute()),
        max_input_tokens=config.data.max_input_tokens,
        max_target_tokens=config.data.max_target_tokens,
        long_rows=config.data.long_rows,
        trainer=config.trainer,
        quantization=config.client.quantization,
        ledger=str(ledger_folder(config, run.folder.rows).absolute()) if config.privacy.on else None,
        signing=str(signing.absolute()) if config.privacy.secure_aggregation else None,
        logs=str(run.folder.trainer_logs.absolute()),
    )


def _most_targets(config: RunConfig, clients: ClientRows) -> int:
    """Return how many target tokens an example may have: of a conversation or a text all may be."""
    data = config.data
    whole = clients.converse or clients.has_texts or config.engine.at_sites
    return data.max_target_tokens + (data.max_input_tokens if whole else 0)


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
    target, tokenizer = run.target
    calibration = config.compression.calibration
    texts = public_texts(calibration, owned, rows=rows, seed=config.seed)
    limit = positions_limit(target, calibration.max_tokens)
    material = Material(
        target=target,
        layer_map=run.layer_map,
        batches=text_batches(texts, tokenizer, max_tokens=limit, batch_size=batch_size),
        trainer=one_device(config.trainer),
        logs=run.folder.trainer_logs / "realignment",
    )
    return Aligner(config.realignment, model, material, seed=config.seed)
