"""Scores of target, proxy, tuned proxy and fused model; each is kept on disk as soon as it is known."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedproxy.config import RunConfig, to_dict
from fedproxy.data.assets import resolve
from fedproxy.errors import CheckpointError, ConfigError
from fedproxy.evaluation.harness import (
    EvaluationResult,
    check_data_tasks,
    check_tasks,
    evaluate_model,
    prompt_notes,
)
from fedproxy.evaluation.means import mean_over_models
from fedproxy.evaluation.own_tasks import is_task_file, own_sha256
from fedproxy.evaluation.task_checks import check_accuracy
from fedproxy.evaluation.task_loading import expand
from fedproxy.files import read_json
from fedproxy.models import load_model, load_tokenizer, placed
from fedproxy.modules.trainer import autocast_dtype
from fedproxy.names import file_stem
from fedproxy.pipeline.context import Run
from fedproxy.pipeline.display import Display
from fedproxy.pipeline.folder import RunFolder
from fedproxy.pipeline.planning.outline import target_config
from fedproxy.pipeline.reuse import SharedWork, evaluation_key, questions_sha256
from fedproxy.pipeline.tuned import MERGED, TunedProxies, folder_of
from fedproxy.reporting.provenance import versions
from fedproxy.reporting.samples import load_samples, save_evaluation
from fedproxy.reporting.scores import MODELS
from fedproxy.sealed import check_tree, content_sha256, read_sealed, remove, tree_sha256, write_sealed

Scores = dict[str, dict[str, float]]
_OF_CLIENTS = ("proxy_tuned", "fused")
"""Models that change with the rounds, and of which clients that are never merged have one each."""


def evaluate(
    run: Run, tuned: TunedProxies, rounds: int, shared: SharedWork | None = None
) -> Iterator[tuple[str, Scores]]:
    """Score the models that the recipe lists, one after another; results of an earlier session are reused.

    Yields:
        Model, and its scores: task to metric to value, without means. Where clients are never merged, those of the
        tuned models are means over clients.
    """
    if not run.config.scored_tasks:
        return
    _drop_outdated(run, rounds)
    _, tokenizer = run.target
    models: Mapping[str, Callable[[str], PreTrainedModel]] = {
        "target": lambda client: run.target[0],
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
            kept = _kept(run, label, settings, run.display.say)
            if kept is None:
                words = name if client == MERGED else f"{name} of client {client!r}"
                kept = _score(run, label, words, models[name](client), tokenizer, settings, shared)
            parts[client] = kept
        yield name, (_keep_means(run, name, parts) if of_clients and tuned.separate else parts[MERGED])["scores"]


def _drop_outdated(run: Run, rounds: int) -> None:
    """Delete what other settings left of models that are not scored again: it pairs with nothing that is."""
    for path in run.folder.evaluation.glob("*.scores.json"):
        label = path.name.removesuffix(".scores.json")
        model = label.split(".")[0]
        if model not in MODELS:  # no run wrote it
            continue
        settings = evaluation_settings(run.config, rounds if model in _OF_CLIENTS else 0)
        if model not in run.config.evaluation.models and _kept(run, label, settings) is None:
            for name in (path.name, *_results(label)):
                remove(path.parent / name)


def expanded(config: RunConfig) -> RunConfig:
    """Return the configuration with lm-eval's tags and plain groups replaced by their tasks, each a source of its own.

    Raises:
        EvaluationError: If lm-eval knows none of that name.
    """
    data = dataclasses.replace(config.data, tasks=expand(config.data.tasks))
    scored = config.evaluation.tasks
    evaluation = dataclasses.replace(config.evaluation, tasks=None if scored is None else expand(scored))
    return dataclasses.replace(config, data=data, evaluation=evaluation)


def check_questions(config: RunConfig, display: Display) -> None:
    """Refuse tasks that cannot be trained on or scored, and say what the target's positions will cut from prompts.

    Raises:
        EvaluationError: If there is one.
        ModelError: If the target has no tokenizer.
    """
    check_data_tasks(config.data.tasks)
    settings, tasks = config.evaluation, config.scored_tasks
    if not tasks:
        return
    check_tasks(tasks, settings.limit, settings.num_fewshot)
    tokenizer = load_tokenizer(resolve(config.target.path) or config.target.path)
    asked: dict[str, Any] = {"limit": settings.limit, "num_fewshot": settings.num_fewshot, "seed": settings.seed}
    for note in prompt_notes(target_config(config), tokenizer, tasks, **asked):
        display.say(f"evaluation: {note}")


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
    settings |= {"tasks": config.evaluation_tasks, "rounds": rounds, "autocast": precision}
    own = {name: own_sha256(name) for name in config.evaluation_tasks if is_task_file(name)}
    return {**settings, "task_files": own} if own else settings


def evaluation_notes(folder: RunFolder, names: Iterable[str]) -> list[str]:
    """Return what the evaluations of these models noted, each sentence once."""
    kept = [read_sealed(scores_file(folder, name)) or {} for name in names]
    return list(dict.fromkeys(note for scores in kept for note in scores.get("notes", [])))


def client_scores(folder: RunFolder, names: Iterable[str]) -> dict[str, dict[str, Scores]]:
    """Return client to model to scores, of the models that every client has its own of."""
    found: dict[str, dict[str, Scores]] = {}
    for name in names:
        for client, scores in (read_sealed(scores_file(folder, name)) or {}).get("clients", {}).items():
            found.setdefault(client, {})[name] = scores
    return found


def _kept(
    run: Run, label: str, settings: Mapping[str, Any], say: Callable[[str], None] = lambda line: None
) -> dict[str, Any] | None:
    """Return a model's kept scores, or None where there are none of these settings, or none that can be used.

    Args:
        run: The run.
        label: The model, and the client whose own it is.
        settings: What scores must have been taken under.
        say: Is told why scores of these settings cannot be used: a file is damaged, or what was scored changed.
    """
    try:
        kept = read_sealed(scores_file(run.folder, label))
        if kept is None or kept["settings"] != settings:
            return None
        check_tree(run.folder.evaluation, kept["files"], *_results(label))
    except CheckpointError as error:
        say(f"{label} is scored again: {error}")
        return None
    now = _scored(run, label, settings)
    changed = [name for name in now if now[name] != kept["scored"].get(name)]
    if changed:
        say(f"{label} is scored again: {' and '.join(changed)} changed")
    return None if changed else kept


def _keep(run: Run, label: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """Write a model's scores, with hashes of their samples, of the model and of the questions."""
    files = tree_sha256(run.folder.evaluation, *_results(label))
    kept = {**content, "scored": _scored(run, label, content["settings"]), "files": files}
    write_sealed(scores_file(run.folder, label), kept)
    return kept


def _results(label: str) -> tuple[str, str]:
    return f"{label}.samples.jsonl", f"{label}.json"


def _scored(run: Run, label: str, settings: Mapping[str, Any]) -> dict[str, str | None]:
    """Return what tells a score's model and questions from others: the files of weights and of questions."""
    model, _, client = label.partition(".")
    parts = {"proxy": ["proxy"], "proxy_tuned": ["proxy", f"adapter/{client}"], "fused": [f"fused/{client}"]}
    tops = parts.get(model, [])
    weights = {
        name: sha
        for name, sha in run.facts.files.items()
        if name.endswith(".safetensors") and any(name.startswith(f"{top.rstrip('/')}/") for top in tops)
    }
    return {
        "the model": content_sha256({"target": run.facts.target_sha256, **weights}),
        "the questions": questions_sha256(settings["tasks"], settings["num_fewshot"]),
        "lm-eval's version": versions().get("lm_eval"),
    }


def _keep_means(run: Run, name: str, parts: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Keep the means over clients where a run of merged clients keeps its one model's scores and samples."""
    labels = {client: _label(name, client) for client in parts}
    scores, samples = mean_over_models(
        [part["scores"] for part in parts.values()], [load_samples(run.folder.root, label) for label in labels.values()]
    )
    lm_eval = read_json(run.folder.evaluation / f"{labels[min(labels)]}.json", dict)
    save_evaluation(run.folder.root, name, samples, lm_eval)
    kept = {
        "model": name,
        "settings": next(iter(parts.values()))["settings"],
        "scores": scores,
        "clients": {client: part["scores"] for client, part in parts.items()},
        "seconds": sum(part["seconds"] for part in parts.values()),
        "notes": list(dict.fromkeys(note for part in parts.values() for note in part.get("notes", []))),
    }
    return _keep(run, name, kept)


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
    shared: SharedWork | None,
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

    key = evaluation_key(run, model, tokenizer, settings) if shared else None
    result = shared.evaluate(key, score) if shared else score()
    save_evaluation(run.folder.root, name, result.samples, result.lm_eval)
    notes = [f"{name}: {note}" for note in result.notes]
    kept = {"model": name, "settings": settings, "scores": result.scores, "seconds": result.seconds, "notes": notes}
    kept = _keep(run, name, kept)
    mean = result.mean.get("acc_norm", result.mean.get("acc"))
    shown = "" if mean is None else f"mean {'acc_norm' if 'acc_norm' in result.mean else 'acc'} {100 * mean:.1f} %  "
    run.display.say(f"evaluated {words}: {shown}{result.seconds:.0f} s")
    for note in notes:
        run.display.say(note)
    return kept
