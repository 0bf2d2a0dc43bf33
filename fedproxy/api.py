"""FedProxy from Python: what the commands do, piece by piece, and what users subclass.

Everything in ``__all__`` is stable: a change of it is in the changelog, with a way over. Nothing here ends the process:
whatever a user, a client or a file causes is a :class:`FedProxyError` of one line.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedproxy.comparison.arguments import KEYS, read_study
from fedproxy.comparison.compare import ComparisonResult
from fedproxy.comparison.compare import compare as do_study
from fedproxy.config import load_config
from fedproxy.config.loading import build
from fedproxy.data.assets import resolve
from fedproxy.data.formats import DataFormat
from fedproxy.data.partition import Partition
from fedproxy.errors import CheckpointError, ConfigError, FedProxyError, ModelError
from fedproxy.evaluation.evaluators import Evaluator
from fedproxy.evaluation.questions import Questions
from fedproxy.evaluation.results import EvaluationResult
from fedproxy.federation.engines import Engine
from fedproxy.files import write_text
from fedproxy.models import LayerMap, load_model, load_tokenizer, save_model, state_sha256
from fedproxy.models.decoder import parameter_count, positions_limit
from fedproxy.modules.optimizers import Optimizer
from fedproxy.modules.schedules import Schedule
from fedproxy.modules.text_nll import text_nll
from fedproxy.overrides import as_word, as_words
from fedproxy.pipeline.context import LAYER_MAP
from fedproxy.pipeline.data import text_batches
from fedproxy.pipeline.finished import note_finished
from fedproxy.pipeline.run import compress_only, run
from fedproxy.protocol import ClientUpdate
from fedproxy.reporting import RunReport, model_card
from fedproxy.strategies.aggregators import Aggregation, Aggregator, Memory, RoundContext
from fedproxy.strategies.compression import CalibrationConfig, Compressor
from fedproxy.strategies.fusion import Fusion
from fedproxy.strategies.fusion.base import check_tuned, state_of
from fedproxy.strategies.realignment import Realignment
from fedproxy.strategies.regularizers import Regularizer
from fedproxy.strategies.round_parts import RoundPart
from fedproxy.strategies.server_optimizers import ServerOptimizer
from fedproxy.strategies.trainable import Trainable

__all__ = [
    "Aggregation",
    "Aggregator",
    "ClientUpdate",
    "ComparisonResult",
    "Compressor",
    "DataFormat",
    "Engine",
    "EvaluationResult",
    "Evaluator",
    "FedProxyError",
    "Fusion",
    "LayerMap",
    "Optimizer",
    "Partition",
    "Proxy",
    "Questions",
    "Realignment",
    "Regularizer",
    "RoundContext",
    "RoundPart",
    "RunReport",
    "Schedule",
    "ServerOptimizer",
    "Trainable",
    "aggregate",
    "compare",
    "compress",
    "compress_recipe",
    "evaluate",
    "fit",
    "fuse",
    "load",
]


def fit(recipe: str | Path, overrides: Mapping[str, Any] | None = None, **keys: Any) -> RunReport:
    """Run a recipe from compression to report: ``fedproxy fit``.

    Every key passes the checks of the command line, and the run's folder is the same to the byte.

    Args:
        recipe: Name of a shipped recipe, or a ``.yaml`` file.
        overrides: Keys of the recipe, dotted or nested, to plain values: ``{"client.lr": 1e-3}``.
        keys: The same by keyword, which come last: ``federation={"rounds": 2}``, ``resume="auto"``.

    Returns:
        The report, which a notebook shows as a page; its ``path`` is the run's folder.

    Raises:
        FedProxyError: If something that a user, a client or a file causes ends the run.
    """
    words = _words(recipe, overrides, keys)
    config = load_config(words)
    report = run(config)
    note_finished(words, config)
    return report


def compress_recipe(recipe: str | Path, overrides: Mapping[str, Any] | None = None, **keys: Any) -> RunReport:
    """Make a recipe's proxy and measure its fidelity, without clients: ``fedproxy compress``.

    :meth:`Proxy.load` reads the proxy from the report's ``path``; healing and distillation are as the recipe says.

    Args:
        recipe: As in :func:`fit`, which goes on from there with ``resume="auto"``.
        overrides: As in :func:`fit`.
        keys: As in :func:`fit`.

    Raises:
        FedProxyError: If something that a user or a file causes ends it.
    """
    return compress_only(load_config(_words(recipe, overrides, keys)))


def compare(
    recipes: Sequence[str | Path] = (),
    *,
    seeds: Sequence[int] | None = None,
    study: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    **keys: Any,
) -> ComparisonResult:
    """Run recipes against each other and write one report: ``fedproxy compare``. Called again, it goes on.

    Args:
        recipes: Names of shipped recipes, or ``.yaml`` files.
        seeds: One run per recipe and seed; None is what the study says, or else 42.
        study: Name of a shipped study, or a ``.yaml`` file.
        overrides: Keys that change every recipe, dotted or nested.
        keys: Keys of the comparison, such as ``output_dir`` or ``methods={"mean": {"recipe": "fedproxy_tiny",
            "aggregator.name": "fedavg"}}``; any other one changes every recipe.

    Raises:
        FedProxyError: If recipes cannot be compared, or no run has a result.
    """
    names = [str(recipe) for recipe in _listed("recipes", recipes, str, Path)]
    listed = list(seeds) if isinstance(seeds, Iterable) and not isinstance(seeds, str) else seeds
    named = {"recipes": names or None, "seeds": listed, "study": study}
    own = {**named, **{key: keys[key] for key in keys if key in KEYS}}
    every = {**_mapping(overrides), **{key: keys[key] for key in keys if key not in KEYS}}
    words = [as_word(key, value) for key, value in own.items() if value is not None] + as_words(every)
    return do_study(read_study(words), words)


def load(path: str | Path, dtype: str = "float32") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model, frozen, on the CPU, and its tokenizer; code that lies beside it is never run.

    Args:
        path: A ``from_pretrained`` folder, ``asset:NAME`` (fetched if missing) or a hub id.
        dtype: float32, bfloat16 or float16.

    Raises:
        FedProxyError: If it cannot be fetched or read, or is not a decoder-only causal language model.
    """
    _require("path", path, str, Path)
    found = resolve(str(path)) or path
    return load_model(found, dtype=dtype), load_tokenizer(found)


@dataclass(frozen=True)
class Proxy:
    """What compression gives: the model that clients tune, and the map that stays with the server."""

    model: PreTrainedModel
    """The proxy, frozen; tune a copy of it, so that fusion knows how it was."""
    tokenizer: PreTrainedTokenizerBase
    """The target's."""
    layer_map: LayerMap
    """Which block of the target each block came from. Clients do not get it."""

    @classmethod
    def load(cls, folder: str | Path, dtype: str = "float32") -> "Proxy":
        """Read a proxy from a run's folder, or from one that :meth:`save` wrote.

        Raises:
            FedProxyError: If there is none, or it is damaged.
        """
        _require("folder", folder, str, Path)
        layer_map = LayerMap.load(Path(folder) / LAYER_MAP)
        model, tokenizer = load(Path(folder) / "proxy", dtype)
        return cls(model, tokenizer, layer_map)

    def save(self, folder: str | Path) -> Path:
        """Write ``proxy/``, which clients may get, and ``server/layer_map.json``, which they may not.

        What could name the target (paths, code, chat templates) is left out of ``proxy/``.

        Returns:
            The folder ``proxy/``.

        Raises:
            CheckpointError: If one of them is there already, or the folder cannot be written.
        """
        _require("folder", folder, str, Path)
        proxy, layer_map = Path(folder) / "proxy", Path(folder) / LAYER_MAP
        for path in (proxy, layer_map):
            if path.exists():
                raise CheckpointError(f"{path} is there already; choose another folder")
        card = model_card("proxy", {}, parameters=parameter_count(self.model))
        save_model(self.model, self.tokenizer, proxy, card=card, anonymous=True)
        write_text(layer_map, self.layer_map.to_json(), private=True)
        return proxy


def compress(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str] = (),
    compressor: Compressor | Mapping[str, Any] | str = "block_influence",
) -> Proxy:
    """Cut a proxy out of a model; the model stays as it is.

    Args:
        target: The model, on any device.
        tokenizer: Its tokenizer.
        texts: Public text by which blocks are chosen, cut to the compressor's ``calibration.max_tokens``; not needed
            where the compressor asks for no scores.
        compressor: The method: its name, a mapping of name and options as in a recipe, or an instance.

    Raises:
        ConfigError: If the options do not fit the model.
        ModelError: If the model cannot be compressed.
        DataError: If scores are needed and the texts hold no token.
    """
    _require("target", target, PreTrainedModel)
    _require("tokenizer", tokenizer, PreTrainedTokenizerBase)
    method: Compressor = _member(Compressor, compressor)
    given, limit = _listed("texts", texts), positions_limit(target, method.calibration.max_tokens)
    batches = text_batches(given, tokenizer, max_tokens=limit) if given else []
    model, layer_map = method.compress(target, batches)
    return Proxy(model.requires_grad_(False), tokenizer, layer_map)


def aggregate(
    updates: Sequence[ClientUpdate],
    rule: Aggregator | Mapping[str, Any] | str = "fedavg",
    *,
    memory: Memory | None = None,
    context: RoundContext | None = None,
) -> Aggregation:
    """Merge clients' updates of one round in float32; the updates stay as they are.

    Args:
        updates: One per client, all with the same tensors.
        rule: The rule: its name, a mapping of name and options as in a recipe, or an instance.
        memory: What the round before returned as ``memory``, for rules that keep some.
        context: Round, seed and state, for rules that need them.

    Raises:
        ClientError: If the updates do not fit each other, or a value is not finite.
        ConfigError: If the rule is unknown or cannot be used this way.
    """
    merging: Aggregator = _member(Aggregator, rule)
    return merging.aggregate(_listed("updates", updates, ClientUpdate), memory, context)


def fuse(
    target: PreTrainedModel,
    proxy: Proxy,
    tuned: PreTrainedModel | Mapping[str, Any],
    fusion: Fusion | Mapping[str, Any] | str = "plug_in",
    *,
    texts: Sequence[str] = (),
) -> PreTrainedModel:
    """Put what a proxy learned back into the model that it was cut out of; all inputs stay as they are.

    Args:
        target: That very model; another one is refused by its hash.
        proxy: The proxy as clients received it.
        tuned: The tuned proxy, a LoRA merged into its weights, or its state dict.
        fusion: The operator: its name, a mapping of name and options as in a recipe, or an instance.
        texts: Public text, for operators that choose an option by it.

    Raises:
        ConfigError: If the operator is unknown, or needs texts and has none.
        ModelError: If target, proxy and tuned proxy do not belong together.
    """
    _require("target", target, PreTrainedModel)
    _require("proxy", proxy, Proxy)
    if not isinstance(tuned, PreTrainedModel | Mapping):
        raise ModelError(
            f"tuned must be a model or its state dict, got {type(tuned).__name__}; merge an adapter first: "
            "tuned.merge_and_unload()"
        )
    operator: Fusion = _member(Fusion, fusion)
    proxy.layer_map.require_target(state_sha256(target))
    weights, given = state_of(tuned), _listed("texts", texts)
    check_tuned(weights, proxy.model.state_dict())
    if operator.judged_texts:
        if not given:
            raise ConfigError(f"fusion.name={operator.name} chooses its options by public text; give texts=[...]")
        limit = positions_limit(target, CalibrationConfig().max_tokens)
        batches = text_batches(given, proxy.tokenizer, max_tokens=limit, batch_size=4)
        judge = partial(text_nll, batches=batches)
        operator = operator.settle(target, proxy.model, weights, proxy.layer_map, judge)
    return operator.join(target, proxy.model, weights, proxy.layer_map)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Questions | Sequence[str],
    *,
    progress: bool = True,
) -> EvaluationResult:
    """Score a model: the scores of ``fedproxy evaluate``, and nothing is written.

    Args:
        model: The model, on the device where it is asked; it stays as it is.
        tokenizer: Its tokenizer.
        questions: What is asked and how, or just names of lm-eval's tasks.
        progress: Whether a bar is shown.

    Raises:
        FedProxyError: If a task or a row cannot be asked.
    """
    _require("model", model, nn.Module)
    _require("tokenizer", tokenizer, PreTrainedTokenizerBase)
    asked = questions if isinstance(questions, Questions) else Questions(_listed("questions", questions))
    return asked.ask(model, tokenizer, progress=progress)


def _words(recipe: str | Path, overrides: Mapping[str, Any] | None, keys: Mapping[str, Any]) -> list[str]:
    """Return what a caller asks for as words of a command line, which are checked as such."""
    given = _mapping(overrides)
    if "recipe" in given:
        raise ConfigError("overrides: recipe is the first argument of the call; take it out")
    return [as_word("recipe", recipe), *as_words(given), *as_words(keys)]


def _mapping(overrides: Mapping[str, Any] | None) -> Mapping[str, Any]:
    _require("overrides", overrides, Mapping, type(None))
    return overrides or {}


def _member(family: Any, given: Any) -> Any:
    """Return a member of a family: itself, or what its name or a recipe's mapping says."""
    if isinstance(given, family):
        return given
    return build(family, {"name": given} if isinstance(given, str) else given, family.family)


def _listed(key: str, items: Iterable[Any], *kinds: type) -> list[Any]:
    """Return what is given as a list, of texts if nothing else is said; one text would be taken for its letters."""
    listed = list(items) if isinstance(items, Iterable) and not isinstance(items, str) else None
    if listed is None or not all(isinstance(item, kinds or str) for item in listed):
        words = "texts" if not kinds or str in kinds else f"{kinds[0].__name__}s"
        got = next((item for item in listed or () if not isinstance(item, kinds or str)), items)
        raise ConfigError(f"{key} must be a list of {words}, got {type(got).__name__}; write [...] around them")
    return listed


def _require(key: str, value: Any, *kinds: type) -> None:
    """Refuse a value of another type."""
    if not isinstance(value, kinds):
        words = " or ".join(kind.__name__ for kind in kinds if kind is not type(None))
        raise ConfigError(f"{key} must be a {words}, got {type(value).__name__}; correct the call")
