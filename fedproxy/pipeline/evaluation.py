"""Scores of target, proxy, tuned proxy and fused model; each is kept on disk as soon as it is known."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedproxy.config import RunConfig, to_dict
from fedproxy.errors import ConfigError
from fedproxy.evaluation.harness import EvaluationResult, evaluate_model
from fedproxy.evaluation.means import mean_over_models
from fedproxy.evaluation.task_checks import check_accuracy
from fedproxy.files import write_json
from fedproxy.models import load_model, placed
from fedproxy.modules.trainer import autocast_dtype
from fedproxy.names import file_stem
from fedproxy.pipeline.folder import RunFolder, read_json
from fedproxy.pipeline.sharing import evaluation_key
from fedproxy.pipeline.stages import Run
from fedproxy.pipeline.tuned import MERGED, TunedProxies, folder_of
from fedproxy.reporting.samples import load_samples, save_evaluation

Scores = dict[str, dict[str, float]]
_OF_CLIENTS = ("proxy_tuned", "fused")
"""Models that change with the rounds, and of which clients that are never merged have one each."""


def evaluate(run: Run, tuned: TunedProxies, rounds: int) -> Iterator[tuple[str, Scores]]:
    """Score the models that the recipe lists, one after another; results of an earlier session are reused.

    Yields:
        Model, and its scores: task to metric to value, without means. Where clients are never merged, those of the
        tuned models are means over clients.
    """
    if not run.config.scored_tasks:
        return
    _drop_outdated(run, rounds)
    _, tokenizer = run.target()
    models: Mapping[str, Callable[[str], PreTrainedModel]] = {
        "target": lambda client: run.target()[0],
        "proxy": lambda client: tuned.proxy,
        "proxy_tuned": lambda client: tuned[client].model(),
        "fused": lambda client: load_model(folder_of(run.folder.fused, client), dtype=run.config.target.dtype),
    }
    for name in run.config.evaluation.models:
        of_clients = name in _OF_CLIENTS
        settings = evaluation_settings(run.config, rounds if of_clients else 0)
        parts = {}
        for client in tuned if of_clients else [MERGED]:
            label = _label(name, client)
            kept = read_json(scores_file(run.folder, label))
            if kept is None or kept["settings"] != settings:
                words = name if client == MERGED else f"{name} of client {client!r}"
                kept = _score(run, label, words, models[name](client), tokenizer, settings)
            parts[client] = kept
        yield name, (_keep_means(run, name, parts) if of_clients and tuned.separate else parts[MERGED])["scores"]


def _drop_outdated(run: Run, rounds: int) -> None:
    """Delete what other settings left of models that are not scored again: it pairs with nothing that is."""
    for path in run.folder.evaluation.glob("*.scores.json"):
        label = path.name.removesuffix(".scores.json")
        model = label.split(".")[0]
        settings = evaluation_settings(run.config, rounds if model in _OF_CLIENTS else 0)
        if model not in run.config.evaluation.models and (read_json(path) or {}).get("settings") != settings:
            for name in (path.name, f"{label}.samples.jsonl", f"{label}.json"):
                (path.parent / name).unlink(missing_ok=True)


def check_comparable(config: RunConfig) -> None:
    """Refuse tasks without an accuracy, by which methods are compared; tasks of the hub are loaded for it.

    Raises:
        ConfigError: If there are no tasks.
        EvaluationError: If one has no accuracy, is unknown or cannot be loaded.
    """
    if not config.evaluation_tasks:
        raise ConfigError("evaluation.tasks names no task, and methods are compared by scores; name at least one")
    check_accuracy(config.evaluation_tasks)


def scores_file(folder: RunFolder, name: str) -> Path:
    """Return where a model's scores are kept, with the settings that they were taken under."""
    return folder.evaluation / f"{name}.scores.json"


def evaluation_settings(config: RunConfig, rounds: int) -> dict[str, Any]:
    """Return what a model's scores depend on, besides the model: they are reused where it is the same."""
    settings = to_dict(config.evaluation)
    del settings["models"], settings["batch_tokens"]
    autocast = autocast_dtype(config.trainer)
    precision = None if autocast is None else str(autocast).removeprefix("torch.")
    return {**settings, "tasks": config.evaluation_tasks, "rounds": rounds, "autocast": precision}


def client_scores(folder: RunFolder, names: Iterable[str]) -> dict[str, dict[str, Scores]]:
    """Return client to model to scores, of the models that every client has its own of."""
    found: dict[str, dict[str, Scores]] = {}
    for name in names:
        for client, scores in (read_json(scores_file(folder, name)) or {}).get("clients", {}).items():
            found.setdefault(client, {})[name] = scores
    return found


def _keep_means(run: Run, name: str, parts: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Keep the means over clients where a run of merged clients keeps its one model's scores and samples."""
    labels = {client: _label(name, client) for client in parts}
    scores, samples = mean_over_models(
        [part["scores"] for part in parts.values()], [load_samples(run.folder.root, label) for label in labels.values()]
    )
    save_evaluation(run.folder.root, name, samples, read_json(run.folder.evaluation / f"{labels[min(labels)]}.json"))
    kept = {
        "model": name,
        "settings": next(iter(parts.values()))["settings"],
        "scores": scores,
        "clients": {client: part["scores"] for client, part in parts.items()},
        "seconds": sum(part["seconds"] for part in parts.values()),
    }
    write_json(scores_file(run.folder, name), kept)
    return kept


def _label(model: str, client: str) -> str:
    """Return what the files of a model's scores are called, of which every client may have its own."""
    return model if client == MERGED else f"{model}.{file_stem(client)}"


def _score(
    run: Run,
    name: str,
    words: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Score one model, say so in ``words``, and keep the scores under ``name``."""
    evaluation = run.config.evaluation

    def score() -> EvaluationResult:
        with run.display.counter(f"evaluating {words}") as advance, placed(model, run.device):
            return evaluate_model(
                model,
                tokenizer,
                run.config.evaluation_tasks,
                limit=evaluation.limit,
                num_fewshot=evaluation.num_fewshot,
                batch_tokens=evaluation.batch_tokens,
                seed=evaluation.seed,
                autocast=autocast_dtype(run.config.trainer),
                progress=advance,
            )

    shared = run.shared
    key = evaluation_key(run, model, tokenizer, settings) if shared else None
    result = shared.evaluate(key, score) if shared else score()
    save_evaluation(run.folder.root, name, result.samples, result.lm_eval)
    kept = {"model": name, "settings": settings, "scores": result.scores, "seconds": result.seconds}
    write_json(scores_file(run.folder, name), kept)
    mean = result.mean.get("acc_norm", result.mean.get("acc"))
    shown = "" if mean is None else f"mean {'acc_norm' if 'acc_norm' in result.mean else 'acc'} {100 * mean:.1f} %  "
    run.display.say(f"evaluated {words}: {shown}{result.seconds:.0f} s")
    return kept
