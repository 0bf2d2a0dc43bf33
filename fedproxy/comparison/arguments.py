"""What a comparison compares: from the command line, from a study file, or from both."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

from fedproxy.config.loading import check_arguments, parse_arguments
from fedproxy.config.plugins import trusted_plugins
from fedproxy.config.references import check_references, resolve
from fedproxy.config.values import typed
from fedproxy.errors import ConfigError, nearest, one_line
from fedproxy.files import at_home
from fedproxy.names import check_names
from fedproxy.overrides import as_words
from fedproxy.recipe_files import studies_folder, study_names
from fedproxy.reporting.comparison.analysis import FUSED
from fedproxy.reporting.scores import MODELS
from fedproxy.yaml_files import read_mapping

_LONGEST_LABEL = 150
"""Most bytes of a method's label, which names folders."""
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


KEYS = tuple(item.name for item in fields(_Arguments))
"""Keys of a comparison's own; any other one changes its recipes."""


def read_study(arguments: Sequence[str]) -> Study:
    """Read ``study=NAME recipes=[...] seeds=[...] key=value ...``.

    Keys that are none of the comparison's own change every recipe, as they would change one run.

    Raises:
        ConfigError: On the first argument that cannot be used; one line that names it. Recipes are looked at as far as
            that needs neither a library nor a plugin.
    """
    own: list[str] = []
    every: list[str] = []
    for argument in arguments:
        key, equals, _ = argument.partition("=")
        if not equals or not key or key.startswith("-"):
            raise ConfigError(
                f"{one_line(repr(argument), 80)} is not a key=value argument; write, for example, "
                "recipes=[fedot,fedproxy]"
            )
        if key in _OF_A_RUN:
            raise ConfigError(f"{key} is not an argument of a comparison; {_OF_A_RUN[key]}")
        (own if key == "study" or key in KEYS else every).append(argument)
    given = parse_arguments(own, _Arguments)
    name = given.pop("study", None)
    study = _checked(_typed({**(_study_file(str(name), every) if name else {}), **given}), every)
    for method in study.methods:
        try:
            check_arguments(method.arguments)
        except ConfigError as error:
            raise ConfigError(f"{method.label}: {error}") from None
    return study


def _study_file(name: str, every: Sequence[str]) -> dict[str, Any]:
    if not name.endswith((".yaml", ".yml")) and name not in study_names():
        raise ConfigError(f"study={one_line(name, 120)}: unknown study{nearest(name, study_names())}")
    path = Path(name) if name.endswith((".yaml", ".yml")) else studies_folder() / f"{name}.yaml"
    content, where = read_mapping(path, "study file"), f"study file {path}"
    for key in content:
        if key not in KEYS:
            raise ConfigError(f"{where}: unknown key {one_line(repr(key), 80)}{nearest(key, KEYS)}")
    check_references(content, where)
    names = [key for key in content if key in ("overrides", "methods")]
    changes = {key: content.pop(key) for key in names}
    _check_plugins(changes, every, where)
    return {**resolve(content), **changes}


def _check_plugins(changes: Mapping[str, Any], every: Sequence[str], where: str) -> None:
    """Refuse a study that lists plugins of which the command line says nothing."""
    methods = changes.get("methods")
    nodes = [changes.get("overrides"), *(methods.values() if isinstance(methods, Mapping) else ())]
    listed = [(where, parse_arguments(as_words(node))) for node in nodes if isinstance(node, Mapping)]
    trusted_plugins(parse_arguments(every), listed)


def _typed(values: Mapping[str, Any]) -> _Arguments:
    seeds = values.get("seeds", [42])
    whole = isinstance(seeds, list) and all(isinstance(seed, int) and not isinstance(seed, bool) for seed in seeds)
    if not whole or not seeds or len(set(seeds)) < len(seeds):
        shown = one_line(repr(seeds), 80)
        raise ConfigError(f"seeds must be a list of different whole numbers such as [42,43], got {shown}")
    recipes = values.get("recipes", [])
    if not isinstance(recipes, list) or not all(isinstance(name, str) for name in recipes):
        shown = one_line(repr(recipes), 80)
        raise ConfigError(f"recipes must be a list of names such as [fedot,fedproxy], got {shown}")
    hints = get_type_hints(_Arguments)
    return _Arguments(**{key: typed(hints[key], value, key) for key, value in values.items()})


def _checked(given: _Arguments, every: Sequence[str]) -> Study:
    _check_keys("overrides", given.overrides)
    shared = (*as_words(given.overrides), *every)
    plugins = [word for word in every if "plugins" in parse_arguments([word])]  # the user's word is the last one
    methods = [Method(_label(name), (f"recipe={name}", *shared)) for name in given.recipes]
    methods += [_method(str(label), node, shared, plugins) for label, node in given.methods.items()]
    labels = [method.label for method in methods]
    if not methods:
        raise ConfigError("recipes is missing; write, for example, recipes=[fedot,fedproxy] or study=NAME")
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ConfigError(f"recipes names {twice[0]!r} twice; name each once, or label them in a study file's methods")
    for key, choices in (("budget", ("equal", "any")), ("equal_bytes", ("least", "most", *labels, None))):
        if getattr(given, key) not in choices:
            known = ", ".join("null" if choice is None else choice for choice in choices)
            raise ConfigError(f"{key} must be one of {known}, got {one_line(repr(getattr(given, key)), 80)}")
    _check_labels(labels)
    if not given.output_dir.strip():
        raise ConfigError("output_dir must be a folder, got an empty text; give one, . for this folder")
    output = at_home(given.output_dir)
    return Study(
        methods=methods,
        seeds=given.seeds,
        output_dir=output,
        work_dir=at_home(given.work_dir) if given.work_dir else output / "work",
        title=one_line(given.title),
        ceiling=_known_label("ceiling", given.ceiling, labels, "centralised"),
        reference=_known_label("reference", given.reference, labels, "fedproxy"),
        budget=given.budget,  # type: ignore[arg-type]
        equal_bytes=given.equal_bytes,
        keep_runs=given.keep_runs,
        only_report=given.only_report,
    )


def _label(recipe: str) -> str:
    return Path(recipe).stem if recipe.endswith((".yaml", ".yml")) else recipe.replace("/", "-")


def _method(label: str, node: Any, shared: Sequence[str], last: Sequence[str]) -> Method:
    if not isinstance(node, Mapping) or not isinstance(node.get("recipe"), str):
        raise ConfigError(
            f"methods.{label} must be a mapping with a recipe, such as {{recipe: fedproxy}}, got "
            f"{one_line(repr(node), 80)}"
        )
    scored = node.get("scored", FUSED)
    if scored not in MODELS:
        shown = one_line(repr(scored), 80)
        raise ConfigError(f"methods.{label}.scored: unknown model {shown}{nearest(str(scored), MODELS)}")
    changes = {key: value for key, value in node.items() if key not in ("recipe", "scored")}
    _check_keys(f"methods.{label}", changes)
    return Method(label, (f"recipe={node['recipe']}", *shared, *as_words(changes), *last), scored)


def _check_labels(labels: Sequence[str]) -> None:
    """Refuse what cannot name a method's folder."""
    for label in labels:
        if Path(label).name != label or label.startswith(".") or len(label.encode("utf-8", "replace")) > _LONGEST_LABEL:
            raise ConfigError(
                f"methods.{one_line(label, 80)}: a label names a folder; use at most {_LONGEST_LABEL} letters, digits, "
                "- and _"
            )
    check_names(labels, "methods")


def _check_keys(where: str, changes: Mapping[str, Any]) -> None:
    for key in changes:
        if key in _OF_A_RUN:
            raise ConfigError(f"{where}.{key} is not a key of a comparison; {_OF_A_RUN[key]}")


def _known_label(key: str, label: str | None, labels: Sequence[str], usual: str) -> str | None:
    if label is None:
        return usual if usual in labels else None
    if label not in labels:
        raise ConfigError(f"{key}={one_line(label, 80)}: no such method in this comparison{nearest(label, labels)}")
    return label
