"""Whether recipes may be compared: same target, rows, prompts and questions, and the same number of examples seen."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from fedproxy.config import RunConfig, to_dict
from fedproxy.errors import ConfigError
from fedproxy.pipeline.reads import flat

_FREE_OF_EVALUATION = ("models", "batch_tokens", "tasks")
TRAINER_PLACES = ("accelerator", "devices", "strategy", "num_nodes")
"""Options of ``trainer`` that say where a run is done, and not what."""
_LABELS = ("recipe", "method", "seed", "output_dir", "resume", "overwrite", "plugins", "loggers", "engine", "trainer")
Configs = Mapping[str, RunConfig]
"""Method to its configuration under one seed."""


def check_fair(configs: Configs, *, budget: str = "equal") -> None:
    """Refuse methods that learn from other rows, are asked other questions or compute in another precision.

    The partition may differ in one way: pooled data is the same rows in one hand.

    Args:
        configs: All methods under one seed.
        budget: ``equal`` also refuses methods that see another number of examples; those that train nothing are free.

    Raises:
        ConfigError: One line that names two methods, the key and the way out.
    """
    sheets = {label: _question_sheet(config) for label, config in configs.items()}
    first, *others = sheets
    for label in others:
        for key in sorted(sheets[first].keys() | sheets[label].keys()):
            _require_equal(key, (first, sheets[first].get(key)), (label, sheets[label].get(key)))
    split = {label: to_dict(c.data.partition) for label, c in configs.items() if c.data.partition.name != "pooled"}
    for label in split:
        _require_equal("data.partition", (next(iter(split)), split[next(iter(split))]), (label, split[label]))
    if budget == "equal":
        _check_budget({label: passes(config) for label, config in configs.items()})
        bounds = {label: _bound(config) for label, config in configs.items() if passes(config)}
        for label in bounds:
            first = next(iter(bounds))
            _require_equal("client.max_steps", (first, bounds[first]), (label, bounds[label]))


def passes(config: RunConfig) -> float:
    """Return how often training sees every row, in the mean: rounds x epochs x share of clients in a round."""
    clients = config.data.partition.count(config.data.tasks, config.data.files)
    drawn = config.federation.clients_per_round
    share = 1.0 if drawn == "all" else int(drawn) / clients
    return config.federation.rounds * config.client.epochs * share


def _bound(config: RunConfig) -> str | None:
    """Return in words how many rows a client sees in a round at most; None where steps are not bounded."""
    client = config.client
    rows = client.batch_size * client.accumulate
    return None if client.max_steps is None else f"{client.max_steps} steps of {rows} rows"


def settings_that_differ(configs: Configs) -> dict[str, dict[str, Any]]:
    """Return per method the settings in which it differs from what most methods have."""
    flattened = {
        label: {key: value for key, value in flat(to_dict(config)).items() if key.split(".")[0] not in _LABELS}
        for label, config in configs.items()
    }
    found: dict[str, dict[str, Any]] = {label: {} for label in configs}
    for key in sorted({key for settings in flattened.values() for key in settings}):
        values = Counter(repr(settings[key]) for settings in flattened.values() if key in settings)
        usual = values.most_common(1)[0][0]
        for label, settings in flattened.items():
            if key in settings and repr(settings[key]) != usual:
                found[label][key] = settings[key]
    return found


def _question_sheet(config: RunConfig) -> dict[str, Any]:
    whole = to_dict(config)
    data = {key: value for key, value in whole["data"].items() if key != "partition"}
    asked = {key: value for key, value in whole["evaluation"].items() if key not in _FREE_OF_EVALUATION}
    asked["tasks"] = config.evaluation_tasks
    trainer = {key: value for key, value in whole["trainer"].items() if key not in TRAINER_PLACES}
    target = {key: whole["target"][key] for key in ("path", "dtype")}
    return flat({"target": target, "data": data, "evaluation": asked, "trainer": trainer})


def _require_equal(key: str, one: tuple[str, Any], other: tuple[str, Any]) -> None:
    if one[1] != other[1]:
        raise ConfigError(
            f"{key}: {one[0]} has {one[1]!r} and {other[0]} has {other[1]!r}; methods are compared on the same data "
            f"and questions in the same arithmetic, give {key}=VALUE for all"
        )


def _check_budget(found: Mapping[str, float]) -> None:
    trained = {label: count for label, count in found.items() if count}
    for label, count in trained.items():
        first = next(iter(trained))
        if count != trained[first]:
            raise ConfigError(
                f"federation.rounds x client.epochs: {first} sees every row {trained[first]:g} times and {label} "
                f"{count:g} times; make them equal, or say budget=any to compare them all the same"
            )
