"""Whether the components that a recipe names go together, told before anything is loaded."""

from collections.abc import Collection

from fedproxy.config import RunConfig
from fedproxy.errors import ConfigError, nearest
from fedproxy.pipeline.devices import check_devices
from fedproxy.pipeline.realignment import check_realignment
from fedproxy.strategies.capabilities import check_capabilities
from fedproxy.strategies.round_parts.ranks import Ranks
from fedproxy.strategies.round_parts.statistics import STATISTICS
from fedproxy.strategies.trainable.lora import Lora

_WHOLE_CONVERSIONS = ("bf16-true", "16-true", "64-true", "64")
"""Lightning's precisions that bring a whole model to another dtype, adapters included."""


def check_components(config: RunConfig) -> None:
    """Refuse a recipe whose components do not go together, before anything is loaded.

    Raises:
        ConfigError: One line that names key, rule and way out.
    """
    clients = config.data.partition.count(len(config.data.tasks) + len(config.data.files))
    drawn, least = config.federation.clients_per_round, config.federation.min_clients
    if least is not None and least > clients:
        raise ConfigError(f"federation.min_clients must be at most the {clients} clients there are, got {least}")
    if drawn != "all" and int(drawn) > clients:
        raise ConfigError(f"federation.clients_per_round must be at most the {clients} clients there are, got {drawn}")
    check_capabilities(
        config.aggregator,
        config.regularizer,
        config.server_optimizer,
        clients_per_round=least or (clients if drawn == "all" else int(drawn)),
        space=config.federation.space,
        parts=config.parts.values(),
        client_statistics=STATISTICS,
        clients=clients,
    )
    _check_sites(config)
    _check_ranks(config)
    _check_trainable(config)
    _check_validation(config)
    check_realignment(config)
    check_devices(config)
    _check_own(config)


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
    if own and config.federation.validation.every:
        raise ConfigError(
            "federation.validation.every must be 0 with data.partition.name=sites: the server has no held-out rows"
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
            "trainable.name=lora without trainable.parameters"
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


def _check_own(config: RunConfig) -> None:
    if getattr(config.aggregator, "fused_b", "mean") != "mean":
        raise ConfigError(
            "aggregator.fused_b: one fused model per client needs one state per client, and a run ends with one; "
            "use aggregator.fused_b=mean"
        )
