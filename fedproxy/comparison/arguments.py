"""What a comparison compares: from the command line, from a study file, or from both."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fedproxy.errors import ConfigError, nearest
from fedproxy.overrides import as_typed
from fedproxy.reporting.comparison.analysis import FUSED
from fedproxy.reporting.scores import MODELS

_SHIPPED = Path(__file__).parent.parent / "_studies"
_CHECKOUT = Path(__file__).parent.parent.parent / "studies"
_OF_A_RUN = {
    "recipe": "write recipes=[NAME,...]",
    "seed": "write seeds=[42,43]",
    "resume": "a comparison always goes on from what is there",
    "overwrite": "delete the record of a run, and with keep_runs its folder, to repeat it",
}


@dataclass(frozen=True)
class Method:
    """One row of a comparison: a recipe with its overrides."""

    label: str
    arguments: tuple[str, ...]
    """Words for :func:`fedproxy.config.load_config`: the recipe first, then what changes it."""
    scored: str = FUSED
    """The model that stands for the method."""


@dataclass(frozen=True)
class Study:
    """All that a comparison was asked to do."""

    methods: Sequence[Method]
    seeds: Sequence[int]
    output_dir: Path
    """Folder of the report and of ``records/``, one small file per run."""
    work_dir: Path
    """Folder of the runs themselves and of what they share."""
    title: str = "Comparison"
    ceiling: str | None = None
    """The method that is the upper bound."""
    reference: str | None = None
    """The method that every other is compared with."""
    budget: Literal["equal", "any"] = "equal"
    """``any`` also compares methods that see another number of examples, and the report says so."""
    equal_bytes: str | None = None
    """A second table at the bytes of the method that sends ``least``, or ``most``, or of the method of this label."""
    keep_runs: bool = False
    """Keep run folders, models and all, after their record is written."""
    only_report: bool = False
    """Run nothing; make the report from the records that are there."""


@dataclass(frozen=True)
class _Arguments:
    """Keys of a study file and of the command line."""

    recipes: list[str] = field(default_factory=list)
    methods: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [42])
    output_dir: str = "runs/comparison"
    work_dir: str | None = None
    title: str = "Comparison"
    ceiling: str | None = None
    reference: str | None = None
    budget: str = "equal"
    equal_bytes: str | None = None
    keep_runs: bool = False
    only_report: bool = False


def read_study(arguments: Sequence[str]) -> Study:
    """Read ``study=NAME recipes=[...] seeds=[...] key=value ...``.

    Keys that are none of the comparison's own change every recipe, as they would change one run.

    Raises:
        ConfigError: On the first argument that cannot be used; one line that names it.
    """
    own: dict[str, Any] = {}
    every: list[str] = []
    for argument in arguments:
        key, equals, _ = argument.partition("=")
        if not equals or not key or key.startswith("-"):
            raise ConfigError(f"{argument!r} is no key=value argument; write, for example, recipes=[fedot,fedproxy]")
        if key in _OF_A_RUN:
            raise ConfigError(f"{key} is not an argument of a comparison; {_OF_A_RUN[key]}")
        if key == "study" or key in _names():
            own |= _parsed(argument, key)
        else:
            every.append(argument)
    study = own.pop("study", None)
    return _checked(_typed({**(_study_file(str(study)) if study else {}), **own}), every)


def study_names() -> tuple[str, ...]:
    """Return the names of the shipped studies."""
    return tuple(sorted(path.stem for path in _folder().glob("*.yaml")))


def _folder() -> Path:
    return _SHIPPED if _SHIPPED.is_dir() else _CHECKOUT


def _names() -> list[str]:
    return [item.name for item in fields(_Arguments)]


def _study_file(name: str) -> dict[str, Any]:
    if not name.endswith((".yaml", ".yml")) and name not in study_names():
        raise ConfigError(f"study={name}: unknown study{nearest(name, study_names())}")
    path = Path(name) if name.endswith((".yaml", ".yml")) else _folder() / f"{name}.yaml"
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"study file {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"study file {path} must hold a mapping of keys to values")
    for key in content:
        if key not in _names():
            raise ConfigError(f"study file {path}: unknown key {key!r}{nearest(str(key), _names())}")
    return {str(key): value for key, value in content.items()}


def _parsed(argument: str, key: str) -> dict[str, Any]:
    try:
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist([as_typed(argument, _Arguments)]))
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise ConfigError(f"{key}: {str(error).strip().splitlines()[0]}") from None
    assert isinstance(parsed, dict)  # from_dotlist makes nothing else
    return {str(name): value for name, value in parsed.items()}


def _typed(values: Mapping[str, Any]) -> _Arguments:
    seeds = values.get("seeds", [42])
    whole = isinstance(seeds, list) and all(isinstance(seed, int) and not isinstance(seed, bool) for seed in seeds)
    if not whole or not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds must be a list of different whole numbers such as [42,43], got {seeds!r}")
    recipes = values.get("recipes", [])
    if not isinstance(recipes, list) or not all(isinstance(name, str) for name in recipes):
        raise ConfigError(f"recipes must be a list of names such as [fedot,fedproxy], got {recipes!r}")
    try:
        typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(_Arguments), dict(values)))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "arguments"
        raise ConfigError(f"{key}: {str(error).strip().splitlines()[0]}") from None
    assert isinstance(typed, _Arguments)
    return typed


def _checked(given: _Arguments, every: Sequence[str]) -> Study:
    _check_keys("overrides", given.overrides)
    shared = (*_words(given.overrides), *every)
    methods = [Method(_label(name), (f"recipe={name}", *shared)) for name in given.recipes]
    methods += [_method(label, node, shared) for label, node in given.methods.items()]
    labels = [method.label for method in methods]
    if not methods:
        raise ConfigError("recipes is missing; write, for example, recipes=[fedot,fedproxy] or study=NAME")
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ConfigError(f"recipes names {twice[0]!r} twice; name each once, or label them in a study file's methods")
    for key, choices in (("budget", ("equal", "any")), ("equal_bytes", ("least", "most", *labels, None))):
        if getattr(given, key) not in choices:
            known = ", ".join("null" if choice is None else choice for choice in choices)
            raise ConfigError(f"{key} must be one of {known}, got {getattr(given, key)!r}")
    output = Path(given.output_dir)
    return Study(
        methods=methods,
        seeds=given.seeds,
        output_dir=output,
        work_dir=Path(given.work_dir) if given.work_dir else output / "work",
        title=given.title,
        ceiling=_known_label("ceiling", given.ceiling, labels, "centralised"),
        reference=_known_label("reference", given.reference, labels, "fedproxy"),
        budget=given.budget,  # type: ignore[arg-type]
        equal_bytes=given.equal_bytes,
        keep_runs=given.keep_runs,
        only_report=given.only_report,
    )


def _label(recipe: str) -> str:
    return Path(recipe).stem if recipe.endswith((".yaml", ".yml")) else recipe.replace("/", "-")


def _method(label: str, node: Any, shared: Sequence[str]) -> Method:
    if not isinstance(node, Mapping) or not isinstance(node.get("recipe"), str):
        raise ConfigError(
            f"methods.{label} must be a mapping with a recipe, such as {{recipe: fedproxy}}, got {node!r}"
        )
    if not label or Path(label).name != label or label.startswith("."):
        raise ConfigError(f"methods.{label}: a label names a folder; use letters, digits, - and _")
    scored = node.get("scored", FUSED)
    if scored not in MODELS:
        raise ConfigError(f"methods.{label}.scored: unknown model {scored!r}{nearest(str(scored), MODELS)}")
    changes = {key: value for key, value in node.items() if key not in ("recipe", "scored")}
    _check_keys(f"methods.{label}", changes)
    return Method(label, (f"recipe={node['recipe']}", *shared, *_words(changes)), scored)


def _check_keys(where: str, changes: Mapping[str, Any]) -> None:
    for key in changes:
        if key in _OF_A_RUN:
            raise ConfigError(f"{where}.{key} is not a key of a comparison; {_OF_A_RUN[key]}")


def _words(node: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return nested values as ``key=value`` words; JSON is YAML, so that every type comes back as it was."""
    words: list[str] = []
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            words += _words(value, f"{prefix}{key}.")
        else:
            words.append(f"{prefix}{key}={json.dumps(value)}")
    return words


def _known_label(key: str, label: str | None, labels: Sequence[str], usual: str) -> str | None:
    if label is None:
        return usual if usual in labels else None
    if label not in labels:
        raise ConfigError(f"{key}={label}: no such method in this comparison{nearest(label, labels)}")
    return label
