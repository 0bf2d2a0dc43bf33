"""Which keys of a recipe and which inputs each stage of a run reads: every key stands here, and a test sees to it.

Two rules follow from the lists alone: whether a run may go on under a changed recipe, and whether a stage has been done
already, here or in an equal run (:mod:`fedproxy.pipeline.stage`, :mod:`fedproxy.pipeline.reuse`).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fedproxy.config import RunConfig, to_dict


@dataclass(frozen=True)
class Reads:
    """What a stage reads."""

    settings: tuple[str, ...]
    """Keys of the recipe; a key stands for all keys below it."""
    sources: tuple[str, ...] = ()
    """Inputs beside the recipe, by the names of ``accept_changed``."""
    again: bool = False
    """Whether the stage is done again where its inputs or outputs have changed; others' work is never thrown away."""
    idle: Callable[[RunConfig], tuple[str, ...]] = lambda config: ()
    """The settings and sources that a recipe makes it not look at."""

    def of(self, config: RunConfig) -> tuple[list[str], list[str]]:
        """Return the settings and the sources that it looks at under a recipe."""
        idle = set(self.idle(config))
        return [key for key in self.settings if key not in idle], [name for name in self.sources if name not in idle]


def _below(group: str, names: str) -> tuple[str, ...]:
    return tuple(f"{group}.{name}" for name in names.split())


UNREAD = ("output_dir", "resume", "accept_changed", "overwrite", "plugins", "loggers", "target.max_shard_size")
"""Keys that say nothing about what is computed; plugins count by their code."""
_ENGINE = ("engine", *_below("trainer", "devices strategy"), *_below("federation", "min_clients round_timeout_s"))
_EVALUATION = (
    *_below("evaluation", "tasks files models limit num_fewshot batch_tokens seed include_path evaluators"),
    *_below("evaluation", "apply_chat_template fewshot_as_multiturn system_instruction"),
)
MAY_CHANGE = (*UNREAD, *_ENGINE, *_EVALUATION, "federation.rounds", "privacy.peers")
"""Keys that may have another value when a run goes on; ``federation.rounds`` may only grow."""

COMPRESS = Reads(
    settings=("seed", "target.dtype", "compression", "healing", "distillation", "trainer"),
    sources=("target", "tokenizer", "calibration", "plugins", "versions"),
    idle=lambda config: () if config.distillation.steps else ("distillation", "trainer"),
)
FEDERATE = Reads(
    settings=(
        *("seed", "target.dtype", "trainable", "regularizer", "aggregator", "server_optimizer", "realignment"),
        *("parts", "privacy", "trainer", "fusion", *_ENGINE),
        *_below(
            "data",
            "tasks files formats weights template_names_target prompt_column target_column label_column rows_per_task",
        ),
        *_below("data", "format template holdout long_rows max_input_tokens max_target_tokens end_token partition"),
        *_below("client", "lr batch_size accumulate epochs weight_decay max_grad_norm gradient_checkpointing"),
        *_below("client", "quantization schedule optimizer max_steps packing"),
        *_below("federation", "rounds clients_per_round space validation sampling max_norm_ratio"),
    ),
    sources=("data", "calibration", "plugins", "versions"),
    idle=lambda config: (
        *(() if config.federation.validation.every and config.federation.validation.model == "fused" else ("fusion",)),
        *(() if any(config.realignment.reads) else ("calibration",)),
    ),
)
FUSE = Reads(settings=("seed", "target.dtype", "fusion"), sources=("calibration",), again=True)
FIDELITY = Reads(settings=("seed", "target.dtype", "compression"), sources=("calibration",), again=True)
EVALUATE = Reads(
    settings=(
        *("target.dtype", "trainer.precision", *_EVALUATION),
        *_below("data", "tasks files format formats prompt_column target_column template end_token holdout"),
    ),
    again=True,
)
REPORT = Reads(settings=("recipe", "method", "target.path", "federation.rounds", *_EVALUATION), again=True)
STAGES = (COMPRESS, FIDELITY, FEDERATE, FUSE, EVALUATE, REPORT)


def values(config: RunConfig, keys: Iterable[str], *, without: Iterable[str] = ()) -> dict[str, Any]:
    """Return the settings under some keys, each by its whole name, and leave out those under others."""
    left_out = tuple(without)
    return {
        key: value
        for key, value in flat(to_dict(config)).items()
        if lies_below(key, keys) and not lies_below(key, left_out)
    }


def lies_below(key: str, groups: Iterable[str]) -> bool:
    """Return whether a key is one of these, or lies below one."""
    return any(key == group or key.startswith(f"{group}.") for group in groups)


def flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested mapping as one level, ``federation.rounds`` to 3 and so on."""
    found: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
