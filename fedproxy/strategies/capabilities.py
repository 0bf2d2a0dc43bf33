"""Which components go together: class facts checked before anything is loaded."""

from collections.abc import Collection

from fedproxy.errors import ConfigError
from fedproxy.strategies.aggregators import Aggregator
from fedproxy.strategies.regularizers import Regularizer
from fedproxy.strategies.round_parts import RoundPart
from fedproxy.strategies.round_parts.clip_noise import ClipNoise
from fedproxy.strategies.round_parts.ranks import Ranks
from fedproxy.strategies.server_optimizers import ServerOptimizer


def check_capabilities(
    aggregator: Aggregator,
    regularizer: Regularizer,
    server_optimizer: ServerOptimizer,
    *,
    clients_per_round: int,
    space: str = "factors",
    parts: Collection[RoundPart] = (),
    secure_aggregation: bool = False,
    client_statistics: Collection[str] = (),
    share: float = 1.0,
) -> None:
    """Refuse a recipe that asks a component for what it cannot do.

    Args:
        aggregator: With its options.
        regularizer: With its options.
        server_optimizer: With its options.
        clients_per_round: Fewest updates that a round will bring.
        space: ``federation.space``, ``factors`` or ``product``.
        parts: Round parts that the recipe adds.
        secure_aggregation: The server sees only the sum of the updates.
        client_statistics: Groups of ``extras`` that the client code sends.
        share: Share of all clients that a round takes.

    Raises:
        ConfigError: One line that names key, rule and way out.
    """
    _check_space(aggregator, space)
    for part in parts:
        _check_part(part, aggregator, regularizer, space)
    if secure_aggregation:
        _check_secure(aggregator, regularizer)
    _check_clients(aggregator, clients_per_round)
    missing = sorted(set(aggregator.needs_extras).difference(client_statistics))
    if missing:
        raise ConfigError(
            f"aggregator.name: {aggregator.name!r} needs clients that send {missing[0]!r} statistics, which they do "
            "not; choose another aggregator or a client that sends them"
        )
    if "personal" in aggregator.parts and not aggregator.linear:
        raise ConfigError(
            f"aggregator.name: {aggregator.name!r} leaves clients tensors of their own, of which the fused model gets "
            f"the weighted mean, and has no weights because it is not linear; use {_with('linear')}"
        )
    if "conflict" in regularizer.parts and not aggregator.aggregates:
        raise ConfigError(
            f"regularizer.name: {regularizer.name!r} needs the conflict between clients, which aggregator "
            f"{aggregator.name!r} never sees; use regularizer.name=none"
        )
    if "control_variates" in regularizer.parts:
        _check_memory(aggregator, regularizer, space)
    if (space == "product" or "base_change" in aggregator.parts) and server_optimizer.name != "none":
        raise ConfigError(
            f"server_optimizer.name: aggregator {aggregator.name!r} merges products and makes LoRA's factors anew, so "
            f"that no step between old and new ones means anything, got {server_optimizer.name!r}; use "
            "server_optimizer.name=none, or federation.space=factors with another aggregator"
        )
    _check_halves(regularizer, server_optimizer, share)
    _check_weights(aggregator, server_optimizer)


def _check_part(part: RoundPart, aggregator: Aggregator, regularizer: Regularizer, space: str) -> None:
    """Refuse an added part that the rules cannot work with."""
    if not aggregator.aggregates:
        raise ConfigError(
            f"parts.{part.name}: aggregator {aggregator.name!r} merges no clients, each of which keeps its own state; "
            "remove the part or use another aggregator"
        )
    if isinstance(part, Ranks) and part.mixes:
        _check_ranks(aggregator, regularizer, space)
    sent = {"control_variates", "statistics"} & {*aggregator.parts, *regularizer.parts}
    if isinstance(part, ClipNoise) and sent:
        raise ConfigError(
            f"parts.clip_noise bounds the update alone, and {min(sent)} of aggregator {aggregator.name!r} and "
            f"regularizer {regularizer.name!r} would leave the client as they are; use other rules or remove the part"
        )


def _check_ranks(aggregator: Aggregator, regularizer: Regularizer, space: str) -> None:
    if not (aggregator.mixed_ranks or (space == "product" and aggregator.space == "any")):
        raise ConfigError(
            f"parts.ranks: aggregator {aggregator.name!r} needs updates of one rank; use parts.ranks.pad=true, "
            f"federation.space=product or {_with('mixed_ranks')}"
        )
    if needs := {"conflict", "control_variates", "personal", "statistics"} & {*aggregator.parts, *regularizer.parts}:
        raise ConfigError(
            f"parts.ranks: {min(needs)} compares coordinates of all clients, which different ranks do not have; use "
            "parts.ranks.pad=true or regularizer.name=none"
        )


def _check_memory(aggregator: Aggregator, regularizer: Regularizer, space: str) -> None:
    if not aggregator.aggregates or "personal" in aggregator.parts:
        raise ConfigError(
            f"regularizer.name: {regularizer.name!r} corrects clients towards a state that all share, and aggregator "
            f"{aggregator.name!r} leaves them tensors of their own; use aggregator.name=fedavg or regularizer.name=none"
        )
    if space == "product":
        raise ConfigError(
            f"regularizer.name: {regularizer.name!r} remembers LoRA factors, which federation.space=product makes anew "
            "every round; use federation.space=factors or regularizer.name=proximal"
        )


def _check_halves(regularizer: Regularizer, server_optimizer: ServerOptimizer, share: float) -> None:
    if server_optimizer.partner not in ("", regularizer.name) or regularizer.partner not in ("", server_optimizer.name):
        named = server_optimizer.partner or regularizer.partner
        raise ConfigError(
            f"server_optimizer.name: regularizer {regularizer.name!r} and server optimizer {server_optimizer.name!r} "
            f"do not go together, {named!r} is one method in two halves; name it in both or in neither"
        )
    if not server_optimizer.partner:
        return
    for option, wanted in (("strength", getattr(regularizer, "strength", None)), ("share", share)):
        got = getattr(server_optimizer, option, wanted)
        if got != wanted:
            raise ConfigError(
                f"server_optimizer.{option}: {server_optimizer.name!r} must have the {option} of the clients' half, "
                f"{wanted:g}, got {got:g}; set server_optimizer.{option}={wanted:g}"
            )


def _check_weights(aggregator: Aggregator, server_optimizer: ServerOptimizer) -> None:
    weighting = getattr(aggregator, "weighting", "uniform")
    if server_optimizer.partner and weighting != "uniform":
        raise ConfigError(
            f"aggregator.weighting: server optimizer {server_optimizer.name!r} keeps the plain mean of what clients "
            f"remember, so that all must weigh alike, got {weighting!r}; set aggregator.weighting=uniform"
        )


def _check_space(aggregator: Aggregator, space: str) -> None:
    if space not in ("factors", "product"):
        raise ConfigError(f"federation.space must be one of factors, product, got {space!r}")
    if aggregator.aggregates and aggregator.space not in ("any", space):
        raise ConfigError(
            f"federation.space: aggregator {aggregator.name!r} is defined in {aggregator.space} space, got {space!r}; "
            f"use federation.space={aggregator.space} or another aggregator"
        )


def _check_secure(aggregator: Aggregator, regularizer: Regularizer) -> None:
    if not aggregator.linear and not aggregator.sum_part:
        raise ConfigError(
            f"aggregator.name: {aggregator.name!r} needs each client's update with these options and cannot run under "
            f"secure aggregation; use {_with('linear')}, or ties with vote=uniform and divisor=count"
        )
    if "conflict" in regularizer.parts:
        raise ConfigError(
            f"regularizer.name: {regularizer.name!r} needs the signs of each client's update, which secure aggregation "
            "hides; use regularizer.name=proximal or none"
        )


def _check_clients(aggregator: Aggregator, clients_per_round: int) -> None:
    if clients_per_round < aggregator.min_clients:
        raise ConfigError(
            f"federation.clients_per_round: aggregator {aggregator.name!r} needs at least {aggregator.min_clients} "
            f"clients a round with these options, got {clients_per_round}; take more clients or another aggregator"
        )


def _with(fact: str) -> str:
    names = [name for name in Aggregator.names() if getattr(Aggregator.by_name(name), fact)]
    return f"one of {', '.join(names)}"
