"""The node ``privacy`` of a recipe: what it goes together with, what it will spend, and what is said of it."""

import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedproxy.config import RunConfig
from fedproxy.data.assets import resolve
from fedproxy.errors import ConfigError
from fedproxy.federation.server.sampling import sample_clients
from fedproxy.privacy.accounting import Release, calibrate, can_keep, spent
from fedproxy.privacy.adaptive_clip import split_noise
from fedproxy.privacy.dp_sgd import sampling_of, steps_of
from fedproxy.privacy.ledger import FOLDER
from fedproxy.reporting.privacy import PrivacyReport
from fedproxy.strategies.round_parts import RoundPart
from fedproxy.strategies.round_parts.privacy import Privacy
from fedproxy.strategies.round_parts.secure_sum import SecureSum
from fedproxy.strategies.round_parts.sign_sums import MOST_CLIENTS

PRECISIONS = ("32-true", "32", "bf16-mixed", "None")
"""trainer.precision with which rows' gradients can be told apart; None is Lightning's default, 32-true."""
WITHHELD = ("losses", "numbers of rows", "numbers of tokens")
"""What clients do not tell under a budget; what rules compute from updates is made of what was released."""


@dataclass(frozen=True)
class Promise:
    """What a plan spends of one client's data, at most."""

    noise_multiplier: float
    epsilon: float
    """After all rounds; infinite without noise."""
    release: Release
    """All rounds together."""


def check_privacy(config: RunConfig, *, here: bool = True) -> None:
    """Refuse a recipe with components that would let out what ``privacy`` protects, before anything is loaded.

    Args:
        config: The recipe.
        here: Whether this machine's packages are to do it.

    Raises:
        ConfigError: One line that names key, rule and way out.
    """
    privacy = config.privacy
    if not privacy.on and not privacy.secure_aggregation:
        return
    for package in ("dp_accounting", "cryptography") if here else ():
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"privacy needs the package {package.replace('_', '-')}; run pip install 'fedproxy[privacy]'"
            )
    if privacy.unit == "example" and config.client.packing:
        raise ConfigError(
            "client.packing: privacy.unit=example clips each row's own gradient, which rows side by side do not have; "
            "use client.packing=false"
        )
    if privacy.secure_aggregation:
        _check_secure(config)
    if privacy.on:
        _check_let_out(config)
        (_check_clients if privacy.unit == "client" else _check_examples)(config)


def _check_let_out(config: RunConfig) -> None:
    """Refuse what would leave clients beside their updates, unaccounted for."""
    privacy = config.privacy
    parts = {*config.aggregator.parts, *config.regularizer.parts}
    if "statistics" in parts:
        raise ConfigError(
            f"privacy.unit={privacy.unit} does not account for the statistics that aggregator "
            f"{config.aggregator.name!r} asks of clients; use another aggregator or privacy.unit=none"
        )
    if "clip_noise" in config.parts:
        raise ConfigError(
            f"parts.clip_noise adds noise that nobody accounts for, and privacy.unit={privacy.unit} its own; remove one"
        )
    if config.federation.sampling == "weighted":
        raise ConfigError(
            f"federation.sampling must be uniform with privacy.unit={privacy.unit}, got 'weighted': numbers of rows "
            "are withheld"
        )
    if getattr(config.aggregator, "weighting", "uniform") == "tokens":
        raise ConfigError(
            f"aggregator.weighting must be examples or uniform with privacy.unit={privacy.unit}, got 'tokens': numbers "
            "of tokens are withheld, and all clients count alike"
        )
    if config.data.holdout is not None:
        raise ConfigError(
            f"data.holdout must be null with privacy.unit={privacy.unit}, got {config.data.holdout}: scores on "
            "clients' held-out rows are not accounted for"
        )


def _check_secure(config: RunConfig) -> None:
    """Refuse what needs, or would let out, single updates where the server is to learn their sum alone."""
    rule, space = config.aggregator, config.federation.space
    if single := {"statistics", "personal", "base_change"} & {*rule.parts, *config.regularizer.parts}:
        raise ConfigError(
            f"privacy.secure_aggregation hides what aggregator {rule.name!r} asks of each client ({min(single)}); use "
            "aggregator.name=fedavg"
        )
    if space == "product":
        raise ConfigError(
            "federation.space must be factors with privacy.secure_aggregation, got 'product': products of a sum are "
            "not the sum of products"
        )
    if other := {"precision", "ranks"} & set(config.parts):
        raise ConfigError(
            f"parts.{min(other)} changes the form of single updates, which privacy.secure_aggregation adds up as they "
            "are; remove it"
        )
    if getattr(rule, "weighting", "uniform") == "tokens":
        raise ConfigError(
            "aggregator.weighting must be examples or uniform with privacy.secure_aggregation, got 'tokens': clients "
            "weigh their own updates, and nobody knows the most tokens of one"
        )
    clients = config.data.partition.count(config.data.tasks, config.data.files)
    drawn = config.federation.clients_per_round
    together = clients if drawn == "all" else int(drawn)
    if rule.sum_part and together > MOST_CLIENTS:
        raise ConfigError(
            f"federation.clients_per_round must be at most {MOST_CLIENTS} with aggregator {rule.name!r} and "
            f"privacy.secure_aggregation, got {together}: a number counts the signs of no more"
        )
    if together < 2:
        raise ConfigError("privacy.secure_aggregation needs at least 2 clients in a round, got 1: their sum is theirs")


def _check_clients(config: RunConfig) -> None:
    rule = config.aggregator
    if not rule.aggregates or "personal" in {*rule.parts}:
        raise ConfigError(
            f"privacy.unit=client covers updates that are merged, and aggregator {rule.name!r} takes tensors of single "
            "clients; use another aggregator or privacy.unit=example"
        )
    if config.privacy.noise_at == "server":
        _check_noise_at_server(config)


def _check_noise_at_server(config: RunConfig) -> None:
    """Refuse what clients would be told of single updates, each of which has a share of the noise or none."""
    rule, term, space = config.aggregator, config.regularizer, config.federation.space
    if not rule.linear:
        raise ConfigError(
            f"privacy.noise_at=server covers a mean of updates, and aggregator {rule.name!r} is not linear; use "
            "privacy.noise_at=client or aggregator.name=fedavg"
        )
    if space == "product":
        raise ConfigError(
            "federation.space must be factors with privacy.noise_at=server, got 'product': products of factors under "
            "a share of the noise each are no mean of updates; use privacy.noise_at=client"
        )
    if "conflict" in term.parts or term.keeps_shared_memory:
        raise ConfigError(
            f"regularizer.name: all clients are sent what regularizer {term.name!r} makes of single updates, and "
            "privacy.noise_at=server covers their mean alone; use privacy.noise_at=client, or "
            "regularizer.name=proximal or none"
        )


def _check_examples(config: RunConfig) -> None:
    devices, precision = config.trainer.get("devices", "auto"), str(config.trainer.get("precision", "32-true"))
    several = len(devices) if isinstance(devices, list) else devices if isinstance(devices, int) else 1
    if several != 1 and several != -1:
        raise ConfigError(
            f"trainer.devices must be 1 with privacy.unit=example, got {devices}: a row's gradient is clipped in one "
            "process"
        )
    if precision not in PRECISIONS:
        raise ConfigError(
            f"trainer.precision must be 32-true or bf16-mixed with privacy.unit=example, got {precision}: scaled "
            "gradients cannot be clipped row by row"
        )
    if config.data.long_rows == "split" or any(weight > 1 for weight in config.data.weights.values()):
        key = "data.long_rows=split" if config.data.long_rows == "split" else "data.weights above 1"
        raise ConfigError(
            f"{key} makes several examples of a row, and privacy.unit=example protects one; use cut or drop, weights "
            "of at most 1, or privacy.unit=client"
        )


def check_budget(config: RunConfig, rows: Mapping[str, int]) -> None:
    """Refuse a plan that no noise or not the given one keeps within its budget.

    Args:
        config: The recipe.
        rows: The number of examples that each client trains on in an epoch, of which its samples are drawn.

    Raises:
        ConfigError: Naming what the plan would spend.
    """
    privacy = config.privacy
    if not privacy.on or privacy.epsilon is None or privacy.delta is None or not config.federation.rounds:
        return
    given = privacy.noise_multiplier
    for planned in _plans(config, rows):
        quick_first = ("rdp", privacy.accountant)
        kept = (can_keep(planned, privacy.epsilon, privacy.delta, accountant) for accountant in quick_first)
        if given is None and not any(kept):
            raise ConfigError(
                f"privacy.epsilon={privacy.epsilon:g} is less than {config.federation.rounds} rounds spend with any "
                f"noise, as far as privacy.accountant={privacy.accountant} can tell (delta {privacy.delta:g}); raise "
                "privacy.epsilon or lower federation.rounds"
            )
        if given is not None and (promise := _promise(config, planned)).epsilon > privacy.epsilon * (1 + 1e-9):
            raise ConfigError(
                f"privacy.epsilon={privacy.epsilon:g} is less than the {promise.epsilon:.3g} that "
                f"{config.federation.rounds} rounds spend with privacy.noise_multiplier={given:g} "
                f"(delta {privacy.delta:g}); lower federation.rounds, raise the noise, or set it to null"
            )


def promised(config: RunConfig, rows: Mapping[str, int]) -> Promise | None:
    """Return what the plan spends of the client that it spends most of; None without privacy."""
    if not config.privacy.on or not config.federation.rounds:
        return None
    chosen = config.privacy.noise_multiplier is None  # then all keep the budget, and the noise differs
    promises = [_promise(config, planned) for planned in _plans(config, rows)]
    return max(promises, key=lambda made: made.noise_multiplier if chosen else made.epsilon)


def _plans(config: RunConfig, rows: Mapping[str, int]) -> Iterator[Release]:
    """Yield what each kind of client releases over all rounds, whatever its noise.

    Where rows are protected there is a kind for each number of rows.
    """
    privacy, part = config.privacy, _part(config, rows, "")
    job = config.client
    for count in sorted(set(rows.values())) if privacy.unit == "example" else [0]:
        if privacy.unit == "example":
            rate, steps = sampling_of(count, job.batch_size * job.accumulate)
            one = Release(0.0, "poisson", rate, steps=steps_of(steps, job.epochs, job.max_steps))
        elif part.sampling == "without_replacement":
            one = Release(0.0, part.sampling, part.drawn / part.among, drawn=part.drawn, of=part.among)
        else:
            one = Release(0.0)
        yield one.times(part.rounds)


def _promise(config: RunConfig, planned: Release) -> Promise:
    privacy, noise = config.privacy, config.privacy.noise_multiplier
    if noise is None and privacy.epsilon is not None and privacy.delta is not None:
        noise = calibrate(planned, privacy.epsilon, privacy.delta, privacy.accountant)
    planned = replace(planned, noise_multiplier=noise or 0.0)
    epsilon = math.inf if privacy.delta is None else spent([planned], privacy.delta, privacy.accountant)
    return Promise(noise or 0.0, epsilon, planned)


def privacy_parts(config: RunConfig, rows: Mapping[str, int], run: str) -> list[RoundPart]:
    """Return the round parts that the node asks for; none without privacy.

    Args:
        config: The recipe.
        rows: Each client's number of rows.
        run: Tells this run's rounds from another's.
    """
    privacy = config.privacy
    parts: list[RoundPart] = [_part(config, rows, run)] if privacy.on else []
    if privacy.secure_aggregation and config.aggregator.sum_part:
        parts.append(RoundPart.made({**config.aggregator.sum_part, "largest": privacy.largest}))
    if privacy.secure_aggregation:
        alike = privacy.on or getattr(config.aggregator, "weighting", "uniform") == "uniform"
        most = 1 if alike else max(rows.values())
        parts.append(SecureSum(run=run, largest=privacy.largest, most=most))
    return parts


def _part(config: RunConfig, rows: Mapping[str, int], run: str) -> Privacy:
    privacy, names = config.privacy, sorted(rows)
    drawn = len(names) if config.federation.clients_per_round == "all" else int(config.federation.clients_per_round)
    # A draw that stays secret counts in every round, one that the server knows where it took a client.
    secret = privacy.counted_sampling == "without_replacement"
    part = Privacy(
        unit=privacy.unit,
        epsilon=privacy.epsilon,
        delta=privacy.delta,
        noise_multiplier=privacy.noise_multiplier,
        clip=privacy.clip or 1.0,
        quantile=privacy.quantile,
        accountant=privacy.accountant,
        sampling=privacy.counted_sampling,
        noise_at=privacy.noise_at,
        drawn=drawn,
        among=len(names),
        rounds=max(1, config.federation.rounds) if secret else _most_rounds(config, names),
        run=run,
        physical_batch=privacy.physical_batch,
        test_seed=privacy.test_seed,
        least=config.federation.min_clients or drawn,
    )
    if privacy.noise_at == "server" and privacy.noise_multiplier is None and config.federation.rounds:
        one = Release(0.0, part.sampling, drawn / len(names), drawn=drawn, of=len(names)) if secret else Release(0.0)
        return replace(part, noise_multiplier=_promise(config, one.times(part.rounds)).noise_multiplier)
    return part


def privacy_lines(config: RunConfig, rows: Mapping[str, int] | None, parameters: int) -> Iterator[tuple[str, str]]:
    """Yield what a plan promises, as names and words; nothing without privacy.

    Args:
        config: The recipe.
        rows: Each client's number of rows; None where they are not known.
        parameters: How many numbers a client trains.
    """
    privacy = config.privacy
    if not privacy.on:
        return
    if rows is None:
        yield "privacy", "unknown: the recipe takes all rows there are; give plan.rows=ROWS_PER_CLIENT"
        return
    promise = promised(config, rows)
    if promise is None:
        return
    bound = "no epsilon: there is no noise" if math.isinf(promise.epsilon) else f"epsilon {promise.epsilon:.3g}"
    delta = "" if privacy.delta is None else f" at delta {privacy.delta:g}"
    draw = {"none": "no draw", "poisson": "Poisson draws"}.get(privacy.counted_sampling, "secret draws of a fixed size")
    yield "privacy", f"{bound}{delta} for each {privacy.unit}, by {privacy.accountant} with {draw} counted on"
    part, z = _part(config, rows, ""), promise.noise_multiplier
    if privacy.quantile is not None:
        z = split_noise(z)[0]
    if privacy.unit == "example":
        sample = promise.release.rate * min(rows.values())
        of, ratio = f"a step's mean over {sample:.3g} rows", z * math.sqrt(parameters) / sample
    else:
        spread = part.drawn if privacy.noise_at == "server" else math.sqrt(part.drawn)
        of, ratio = f"the mean of {part.drawn} updates", z * math.sqrt(parameters) / spread
    yield (
        "noise against signal",
        f"{z:.3g} x clip; in {of} it is {ratio:.3g} times as long as the longest signal",
    )
    yield "withheld by clients", ", ".join(WITHHELD)


def privacy_report(config: RunConfig, rounds: Sequence[Mapping[str, Any]]) -> PrivacyReport | None:
    """Return what the report says of privacy; None without it.

    Args:
        config: The recipe.
        rounds: Records of the finished rounds.
    """
    privacy, told = config.privacy, [line["privacy"] for line in rounds if "privacy" in line]
    if not privacy.on:
        return None
    spent_ = [line["epsilon"] for line in told]
    return PrivacyReport(
        unit=privacy.unit,
        epsilon=None if None in spent_ else max(spent_, default=0.0),
        budget=privacy.epsilon,
        delta=privacy.delta,
        accountant=privacy.accountant,
        sampling=privacy.counted_sampling,
        noise_multiplier=min((line["noise_multiplier"] for line in told), default=None),
        clip=told[-1].get("clip", privacy.clip) if told else privacy.clip,
        quantile=privacy.quantile,
        noise_at=privacy.noise_at,
        withheld=WITHHELD,
        foreseeable=privacy.test_seed is not None,
    )


def _most_rounds(config: RunConfig, names: list[str]) -> int:
    """Return in how many rounds the client is drawn that is drawn most often."""
    per_round, rounds = config.federation.clients_per_round, config.federation.rounds
    if per_round in ("all", len(names)):
        return max(1, rounds)
    counts = dict.fromkeys(names, 0)
    for number in range(1, rounds + 1):
        for name in sample_clients(names, per_round, seed=config.seed, round=number):
            counts[name] += 1
    return max(1, *counts.values())


def ledger_folder(config: RunConfig, rows: Path) -> Path:
    """Return where the clients' ledgers lie: beside their data.

    Args:
        config: The recipe.
        rows: The run's own folder of rows, for data that is nobody's: public tasks.

    Raises:
        ConfigError: If files of data lie in several folders, and privacy.ledger does not choose.
    """
    if config.privacy.ledger is not None:
        return Path(config.privacy.ledger)
    local = [path for value in config.data.files.values() if (path := resolve(value)) is not None]
    folders = sorted({path.parent.absolute() for path in local})
    if len(folders) > 1:
        raise ConfigError(
            f"privacy.ledger must name one folder where data.files lie in several ({folders[0]}, {folders[1]})"
        )
    return (folders[0] if folders else rows) / FOLDER
