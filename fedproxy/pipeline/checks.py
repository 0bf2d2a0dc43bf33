"""Everything that can be known to be wrong with a recipe before any work is done and anything is written."""

from collections.abc import Collection, Container

import torch
from transformers import PreTrainedModel

from fedproxy.config import RunConfig
from fedproxy.data.assets import fetch, resolve
from fedproxy.data.sources import read_texts
from fedproxy.errors import ConfigError, ModelError, nearest
from fedproxy.evaluation.harness import missing_assets
from fedproxy.models import Decoder, check_model, load_tokenizer
from fedproxy.models.checkpoints import check_tokenizer
from fedproxy.models.loading import build
from fedproxy.models.quantized import check_quantization
from fedproxy.modules.devices import ClientDevices, one_device, training_device
from fedproxy.modules.distillation import require_float32
from fedproxy.modules.teacher import check_top_k, vocabulary_size
from fedproxy.modules.trainer import make_trainer
from fedproxy.pipeline.data import check_held_out, public_texts, rows_read, texts_read
from fedproxy.pipeline.display import Display
from fedproxy.pipeline.evaluation import check_questions, expanded
from fedproxy.pipeline.loggers import check_loggers
from fedproxy.pipeline.planning.outline import target_config
from fedproxy.pipeline.planning.ranks import with_ranks_that_fit
from fedproxy.pipeline.privacy import check_privacy
from fedproxy.strategies.capabilities import check_capabilities
from fedproxy.strategies.compression.healing import NEEDS_GAPS
from fedproxy.strategies.round_parts.ranks import Ranks
from fedproxy.strategies.round_parts.statistics import STATISTICS
from fedproxy.strategies.trainable.lora import Lora

_WHOLE_CONVERSIONS = ("bf16-true", "16-true", "64-true", "64")
"""Lightning's precisions that bring a whole model to another dtype, adapters included."""


def check(named: RunConfig, display: Display | None = None, *, here: bool = True, fidelity: bool = False) -> RunConfig:
    """Refuse a recipe that cannot be run, before any work is done and anything is written: the one list of all checks.

    Args:
        named: The recipe, with tasks as it names them.
        display: Is told what will be cut from prompts.
        here: Whether this machine is to do the work: then its devices and packages, the target's tokenizer, texts and
            questions are looked at too, and assets fetched. Otherwise shapes are all that is read.
        fidelity: Whether the proxy's fidelity will be measured, on texts that compression does not read.

    Returns:
        The recipe with tags and groups of tasks replaced by their tasks.

    Raises:
        FedProxyError: In one line that names key, rule and way out.
    """
    config = expanded(named)
    check_components(config, here=here)
    config = with_ranks_that_fit(config)
    if not here:
        check_shapes(config)
        return config
    check_loggers(config.loggers)
    make_trainer(one_device(config.trainer))  # Lightning checks the options' values when it gets them
    _fetch_assets(named)  # what a tag stands for is not fetched unasked
    target = check_shapes(config)
    check_tokenizer(target, load_tokenizer(resolve(config.target.path) or config.target.path), config.target.path)
    check_questions(config, display or Display())
    if config.resume != "auto":  # a run to go on with may have all it needs of the texts
        check_calibration(config, held_out=fidelity)
    return config


def _fetch_assets(config: RunConfig) -> None:
    """Bring every asset that the recipe names into the cache, so that the rest of the run needs no network.

    Raises:
        AssetError: If an asset is unknown or cannot be fetched.
        ModelError: If the target is no decoder-only causal LM.
    """
    for name in missing_assets([*config.data.tasks, *config.scored_tasks]):
        fetch(name)
    check_model(resolve(config.target.path) or config.target.path)
    resolve(config.compression.calibration.path)


def check_participation(config: RunConfig, clients: int) -> None:
    """Refuse rounds that ask for more clients than there are.

    Raises:
        ConfigError: Naming the key.
    """
    drawn, least = config.federation.clients_per_round, config.federation.min_clients
    if least is not None and least > clients:
        raise ConfigError(f"federation.min_clients must be at most the {clients} clients there are, got {least}")
    if drawn != "all" and int(drawn) > clients:
        raise ConfigError(f"federation.clients_per_round must be at most the {clients} clients there are, got {drawn}")


def check_components(config: RunConfig, *, here: bool = True) -> None:
    """Refuse a recipe whose components do not go together, before anything is loaded.

    Args:
        config: The recipe.
        here: Whether they must go together with this machine's devices, too.

    Raises:
        ConfigError: One line that names key, rule and way out.
    """
    clients = config.data.partition.count(config.data.tasks, config.data.files)
    check_participation(config, clients)
    drawn = clients if config.federation.clients_per_round == "all" else int(config.federation.clients_per_round)
    check_capabilities(
        config.aggregator,
        config.regularizer,
        config.server_optimizer,
        clients_per_round=config.federation.min_clients or drawn,
        space=config.federation.space,
        parts=config.parts.values(),
        client_statistics=STATISTICS,
        share=drawn / clients,
        secure_aggregation=config.privacy.secure_aggregation,
    )
    _check_sites(config)
    _check_ranks(config)
    _check_trainable(config)
    _check_validation(config)
    check_realignment(config)
    check_devices(config, here=here)
    check_privacy(config, here=here)


def _check_sites(config: RunConfig) -> None:
    """Refuse rows at sites without an engine that reaches them, and the other way round."""
    own, engine = config.data.partition.name == "sites", config.engine
    if own and not engine.at_sites:
        raise ConfigError(f"data.partition.name=sites needs engine.name=flower, got {engine.name}")
    if engine.at_sites and not own:
        raise ConfigError(
            f"engine.name={engine.name}: sites have rows of their own and none are dealt out; use "
            f"data.partition.name=sites, got {config.data.partition.name}"
        )
    if own and "base_change" in config.aggregator.parts:
        _check_base_change_at_sites(config)
    if own and config.federation.validation.every and config.federation.validation.evaluator is None:
        raise ConfigError(
            "federation.validation.every must be 0 with data.partition.name=sites: the server has no held-out rows; "
            "name a federation.validation.evaluator to score rounds on other questions"
        )


def _check_base_change_at_sites(config: RunConfig) -> None:
    """Refuse rounds without some sites where each round's change of the frozen weights is sent once."""
    clients = config.data.partition.count(config.data.tasks, config.data.files)
    for key, usual in (("clients_per_round", "all"), ("min_clients", None)):
        if (got := getattr(config.federation, key)) not in (usual, clients):
            raise ConfigError(
                f"federation.{key} must be {usual or 'null'} at real sites with aggregator.name="
                f"{config.aggregator.name}, got {got}: it moves frozen weights in every round, and a site that misses "
                "one cannot go on; or use another aggregator"
            )


def _check_ranks(config: RunConfig) -> None:
    """Refuse ranks of clients that the trainable part does not have."""
    part, trained = config.parts.get("ranks"), config.trainable
    if not isinstance(part, Ranks):
        return
    if not isinstance(trained, Lora):
        raise ConfigError(f"parts.ranks needs trainable.name=lora, got {trained.name}; remove it or use lora")
    above = {client: rank for client, rank in part.clients.items() if rank > trained.r}
    if above:
        client = min(above)
        raise ConfigError(
            f"parts.ranks.clients.{client} must be at most trainable.r={trained.r}, got {above[client]}; raise "
            "trainable.r"
        )


def check_named_clients(config: RunConfig, clients: Collection[str]) -> None:
    """Refuse options for clients that nobody is.

    Args:
        config: The recipe.
        clients: The names of all clients.

    Raises:
        ConfigError: Naming the first client that is none.
    """
    for name, part in config.parts.items():
        for client in sorted(set(part.differs).difference(clients)):
            raise ConfigError(f"parts.{name}: there is no client {client!r}{nearest(client, clients)}")


def _check_trainable(config: RunConfig) -> None:
    """Refuse rounds and rules that ask more of what is trained than it gives."""
    trained, rule, space = config.trainable, config.aggregator, config.federation.space
    if not trained.trains and config.federation.rounds:
        raise ConfigError(
            f"trainable.name={trained.name} trains nothing in {config.federation.rounds} rounds; use "
            "federation.rounds=0, or trainable.name=lora"
        )
    if trained.needs_float32 and config.target.dtype != "float32":
        raise ConfigError(
            f"trainable.name={trained.name} trains the proxy's own weights, and in {config.target.dtype} small steps "
            "are lost; use target.dtype=float32 or trainable.name=lora"
        )
    precision = str(config.trainer.get("precision", "32-true"))
    if precision in _WHOLE_CONVERSIONS:
        raise ConfigError(
            f"trainer.precision={precision} converts what is trained, which crosses the wire in float32; use 32-true "
            f"(frozen weights stay in target.dtype={config.target.dtype}) or bf16-mixed"
        )
    if trained.lora_scaling is None and trained.trains and (space == "product" or rule.space != "any"):
        key = f"aggregator.name={rule.name}" if rule.space != "any" else "federation.space=product"
        raise ConfigError(
            f"{key} needs one pair of LoRA factors for each matrix, and {trained.key} has none; use "
            "trainable.name=lora without trainable.parameters and trainable.dora"
        )
    if not rule.aggregates and space == "product":
        raise ConfigError(
            f"federation.space=product says how clients are merged, and aggregator.name={rule.name} merges none; "
            "use federation.space=factors"
        )


def _check_validation(config: RunConfig) -> None:
    """Refuse validation between rounds where the state alone is not the model that would be fused."""
    rule = config.aggregator
    one_state = rule.aggregates and not {"base_change", "personal"} & set(rule.parts)
    if config.federation.validation.every and not one_state:
        raise ConfigError(
            f"federation.validation.every must be 0 with aggregator.name={rule.name}: there is no one state to score"
        )


def check_realignment(config: RunConfig) -> None:
    """Refuse a re-alignment that has nothing to align, before anything is loaded.

    Raises:
        ConfigError: One line that names key, rule and way out.
    """
    rows, _ = config.realignment.reads
    name = config.realignment.name
    if not rows:
        return
    if getattr(config.trainable, "blocks", None) == "all":
        raise ConfigError(
            f"realignment.name={name} needs blocks that no client trains, but trainable.blocks is 'all'; "
            "set trainable.blocks (ends, last or a list), or realignment.name=none"
        )
    if not config.aggregator.aggregates or "base_change" in config.aggregator.parts:
        raise ConfigError(
            f"realignment.name={name} needs one adapter that all clients share on weights that stay, which "
            f"aggregator.name={config.aggregator.name} does not give; use another aggregator or realignment.name=none"
        )
    if config.fusion.keeps_proxy:
        raise ConfigError(
            f"fusion.name={config.fusion.name} ends with the tuned proxy, but realignment.name={name} moves blocks of "
            "it that nobody tunes; use fusion.name=plug_in, or realignment.name=none"
        )


def check_devices(config: RunConfig, *, here: bool = True) -> None:
    """Refuse devices that do not fit a client's training; ``here`` says whether this machine must have them.

    Raises:
        ConfigError: If they do not go together with the machine, with each other or with the recipe's rules.
    """
    devices = ClientDevices.of(config.trainer if here else {**config.trainer, "accelerator": "cpu"})
    rows = config.client.batch_size
    if rows < devices.count:
        raise ConfigError(
            f"client.batch_size must be at least the {devices.count} devices that share a batch "
            f"(trainer.devices={config.trainer['devices']}), got {rows}"
        )
    config.client.optimizer.check(training_device(one_device(config.trainer)).type, devices.strategy)
    if devices.strategy == "fsdp":
        _check_sharded(config)
    if config.client.quantization != "none":
        _check_quantized(config, devices, here=here)


def _check_sharded(config: RunConfig) -> None:
    """Refuse what needs a whole model on one device."""
    rule, term, trained = config.aggregator, config.regularizer, config.trainable
    if isinstance(trained, Lora) and (trained.parameters or trained.dora):
        key, why = trained.key, "puts its change into weights as they are used"
    elif "base_change" in rule.parts:
        key, why = f"aggregator.name={rule.name}", "moves the frozen weights"
    elif "statistics" in rule.parts:
        key, why = f"aggregator.name={rule.name}", "needs statistics of each row's gradient"
    elif not term.coordinatewise:
        key, why = f"regularizer.name={term.name}", "is not declared a sum over coordinates (coordinatewise)"
    else:
        return
    raise ConfigError(f"{key} {why}, which trainer.strategy=fsdp cannot do on spread weights; use trainer.strategy=ddp")


def _check_quantized(config: RunConfig, devices: ClientDevices, *, here: bool) -> None:
    """Refuse what reads or moves weights that are quantised."""
    rule, trained, bits = config.aggregator, config.trainable, config.client.quantization
    if trained.lora_scaling is None and trained.trains:
        key = trained.key
    elif {"base_change", "statistics"} & set(rule.parts):
        key = f"aggregator.name={rule.name}"
    elif any(config.realignment.reads):
        key = f"realignment.name={config.realignment.name}"
    elif devices.strategy == "fsdp":
        key = "trainer.strategy=fsdp"
    else:
        if here:
            check_quantization(bits, training_device(one_device(config.trainer)).type)
        return
    raise ConfigError(f"{key} needs the proxy's own weights, which client.quantization={bits} rounds; set it to none")


def check_shapes(config: RunConfig) -> PreTrainedModel:
    """Refuse a target that cannot be compressed or trained, and options that do not fit its shape.

    Returns:
        The target on the meta device.

    Raises:
        ConfigError: If an option does not fit the target, or healing the compressor.
        ModelError: If the target is no decoder that the compressor can work on.
    """
    if config.healing.rows and not config.compression.leaves_gaps:
        raise ConfigError(NEEDS_GAPS)
    shape = target_config(config)
    with torch.device("meta"):
        try:
            target = build(shape, getattr(torch, config.target.dtype))
        except ModelError as error:
            raise ModelError(f"target.path={config.target.path}: {error}") from error
        config.compression.outline(Decoder.of(target))
        config.trainable.check(Decoder.of(target))
    settings = config.distillation
    if settings.steps and settings.train == "full":
        require_float32(target, "distillation.train=full", "distillation.train=lora")
    if settings.steps and settings.cache_teacher:
        check_top_k(settings.top_k, vocabulary_size(target))
    return target


def check_public(config: RunConfig, owned: Container[str]) -> None:
    """Refuse calibration text of which nothing is left without the clients' rows.

    Args:
        config: The recipe.
        owned: Clients' texts.

    Raises:
        DataError: If nothing is left for compression, healing or distillation.
    """
    for rows in set(rows_read(config)) - {0}:
        public_texts(config.compression.calibration, owned, rows=rows, seed=config.seed)


def check_calibration(config: RunConfig, *, held_out: bool = False) -> None:
    """Refuse calibration text that cannot be read, or too little of it.

    Args:
        config: The recipe.
        held_out: Whether more texts are needed than compression reads, to measure fidelity on.

    Raises:
        DataError: If it cannot be read, a text is empty, or there are too few.
        AssetError: If it is an asset that is unknown or cannot be fetched.
    """
    calibration, rows = config.compression.calibration, texts_read(config)
    read_texts(calibration.path, rows, config.seed)
    if held_out:
        check_held_out(calibration, used=rows)
