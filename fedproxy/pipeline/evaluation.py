"""Scores of target, proxy, tuned proxy and fused model; each is kept on disk as soon as it is known."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedproxy.config import RunConfig, to_dict
from fedproxy.errors import CheckpointError, ConfigError
from fedproxy.evaluation.evaluators import Evaluator
from fedproxy.evaluation.evaluators.base import Asked
from fedproxy.evaluation.evaluators.own_data import OwnData
from fedproxy.evaluation.means import mean_over_models
from fedproxy.evaluation.own_data import scores_of_rows
from fedproxy.evaluation.results import EvaluationResult, merged_details
from fedproxy.evaluation.task_checks import headlines
from fedproxy.evaluation.task_loading import expand
from fedproxy.evaluation.task_rows import check_data_tasks
from fedproxy.files import read_json
from fedproxy.metric_facts import HEADLINES, facts, headline_of
from fedproxy.models import load_model
from fedproxy.modules.trainer import autocast_dtype
from fedproxy.names import file_stem
from fedproxy.pipeline.asked import HELD_OUT, asked_of, asking, held_out_rows, with_rows
from fedproxy.pipeline.context import Run
from fedproxy.pipeline.data import target_tokenizer
from fedproxy.pipeline.display import Display
from fedproxy.pipeline.folder import RunFolder
from fedproxy.pipeline.kept_scores import KeptScores, ask
from fedproxy.pipeline.planning.outline import target_config
from fedproxy.pipeline.reuse import questions_sha256
from fedproxy.pipeline.tuned import MERGED, TunedProxies, folder_of
from fedproxy.reporting.provenance import versions
from fedproxy.reporting.samples import load_samples, save_evaluation
from fedproxy.reporting.scores import MODELS
from fedproxy.sealed import check_tree, content_sha256, read_sealed, remove, tree_sha256, write_sealed

Scores = dict[str, dict[str, float]]
_OF_CLIENTS = ("proxy_tuned", "fused")
"""Models that change with the rounds, and of which clients that are never merged have one each."""


def evaluate(
    run: Run, tuned: TunedProxies, rounds: int, others: KeptScores | None = None
) -> Iterator[tuple[str, Scores]]:
    """Score the models that the recipe lists, one after another; results of an earlier session are reused.

    Args:
        run: The run.
        tuned: The tuned proxies.
        rounds: How many rounds trained them.
        others: Scores of other runs.

    Yields:
        Model, and its scores: task to metric to value, without means. Where clients are never merged, those of the
        tuned models are means over clients.
    """
    if not run.config.asks:
        return
    whom = _Asked(run, separate=tuned.separate)
    _drop_outdated(run, whom, rounds)
    tokenizer = target_tokenizer(run.config)
    models: Mapping[str, Callable[[str], PreTrainedModel]] = {
        "target": lambda client: run.target[0],
        "proxy": lambda client: tuned.proxy,
        "proxy_tuned": lambda client: tuned[client].model(),
        "fused": lambda client: load_model(folder_of(run.folder.fused, client), dtype=run.config.target.dtype),
    }
    for name in run.config.evaluation.models:
        of_clients = name in _OF_CLIENTS
        parts = {}
        for client in tuned if of_clients else [MERGED]:
            label, asked = _label(name, client), whom.of(client)
            settings = evaluation_settings(run.config, asked, rounds if of_clients else 0)
            kept = _kept(run, label, settings, run.display.say)
            if kept is None:
                words = name if client == MERGED else f"{name} of client {client!r}"
                kept = _score(run, label, words, models[name](client), tokenizer, asked, settings, others)
                run.let_go()
            parts[client] = kept
        yield name, (_keep_means(run, name, parts) if of_clients and tuned.separate else parts[MERGED])["scores"]


class _Asked:
    """What every model is asked: its client's own held-out rows where clients are never merged, else all clients'."""

    def __init__(self, run: Run, *, separate: bool) -> None:
        self._plain = run.asked
        clients = list(run.clients) if run.config.data.holdout is not None else []
        self._own = {client: run.clients.held_out(client) for client in clients}
        self._all = with_rows(self._plain, held_out_rows(self._own))
        self._separate = separate
        self.clients = {file_stem(client): client for client in clients} if separate else {}

    def of(self, client: str) -> Asked:
        """Return what a client's own model is asked, or the one of all clients."""
        if client == MERGED or not self._separate:
            return self._all
        return with_rows(self._plain, held_out_rows({client: self._own.get(client, [])}))


def _drop_outdated(run: Run, whom: _Asked, rounds: int) -> None:
    """Delete what other settings left of models that are not scored again: it pairs with nothing that is."""
    for path in run.folder.evaluation.glob("*.scores.json"):
        label = path.name.removesuffix(".scores.json")
        model, _, stem = label.partition(".")
        if model not in MODELS:  # no run wrote it
            continue
        asked = whom.of(whom.clients.get(stem, MERGED))
        settings = evaluation_settings(run.config, asked, rounds if model in _OF_CLIENTS else 0)
        if model not in run.config.evaluation.models and _kept(run, label, settings) is None:
            for name in (path.name, *_results(label)):
                remove(path.parent / name)


def expanded(config: RunConfig) -> RunConfig:
    """Return the configuration with lm-eval's tags and plain groups replaced by their tasks, each a source of its own.

    Raises:
        EvaluationError: If lm-eval knows none of that name.
    """
    folder, scored = config.evaluation.include_path, config.evaluation.tasks
    data = dataclasses.replace(config.data, tasks=expand(config.data.tasks, folder))
    evaluation = dataclasses.replace(config.evaluation, tasks=None if scored is None else expand(scored, folder))
    return dataclasses.replace(config, data=data, evaluation=evaluation)


def check_questions(config: RunConfig, display: Display) -> None:
    """Refuse what cannot be trained on or asked, and say what the target's positions will cut from prompts.

    Raises:
        FedProxyError: If there is such a task, row or setting of an evaluator.
        ModelError: If the target has no tokenizer.
    """
    check_data_tasks(config.data.tasks)
    asked = asked_of(config)
    members = asking(config, asked)
    if not config.evaluation.models or not members:
        return
    _check_sources(asked, members)
    for member in members.values():
        member.check(asked)
    tokenizer, shape = target_tokenizer(config), target_config(config)
    for member in members.values():
        for note in member.notes(asked, shape, tokenizer):
            display.say(f"evaluation: {note}")


def _check_sources(asked: Asked, members: Mapping[str, Evaluator]) -> None:
    """Refuse two sources of one name, whose scores would be one.

    Raises:
        ConfigError: Naming it.
    """
    seen: dict[str, str] = {}
    for name, member in members.items():
        for source in member.sources(asked):
            other = seen.setdefault(source, name)
            if other != name:
                raise ConfigError(
                    f"evaluation: {source!r} is the name of a source of {other} and of {name}; rename one of them"
                )


def check_comparable(config: RunConfig) -> None:
    """Refuse sources without a metric in common, by which methods are compared; tasks of the hub are loaded for it.

    Raises:
        ConfigError: If nothing is asked, or nothing is in common.
        EvaluationError: If a task is unknown or cannot be loaded.
    """
    asked = asked_of(config)
    members = asking(config, asked)
    if not members and config.data.holdout is None:
        raise ConfigError(
            "evaluation.tasks and evaluation.files name nothing, and methods are compared by scores; name at least one"
        )
    common = None if config.data.holdout is None else {OwnData.headline}
    for name, member in members.items():
        for source in member.sources(asked):
            found = headlines(source) if name == "lm_eval" else {member.headline} & set(HEADLINES)
            if not (found if common is None else found & common):
                raise ConfigError(
                    f"evaluation: {source!r} has no metric by which methods could be compared, as sources before it do "
                    f"({', '.join(sorted(common or HEADLINES))}); leave it out"
                )
            common = found if common is None else found & common


def scores_file(folder: RunFolder, name: str) -> Path:
    """Return where a model's scores are kept, with the settings that they were taken under."""
    return folder.evaluation / f"{name}.scores.json"


def evaluation_settings(config: RunConfig, asked: Asked, rounds: int) -> dict[str, Any]:
    """Return what a model's scores depend on, besides the model: they are reused where it is the same."""
    settings = to_dict(config.evaluation)
    del settings["models"], settings["batch_tokens"], settings["files"], settings["include_path"]
    autocast = autocast_dtype(config.trainer)
    precision = None if autocast is None else str(autocast).removeprefix("torch.")
    settings |= {"tasks": config.evaluation_tasks, "rounds": rounds, "autocast": precision}
    members = asking(config, asked)
    settings["evaluators"] = {name: to_dict(member) for name, member in members.items()}
    return settings | {"asked": {name: member.fingerprint(asked) for name, member in members.items()}}


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
        if kept is None or kept["settings"] != settings or None in settings["asked"].values():
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
    """Keep the means over clients where a run of merged clients keeps its one model's scores and samples.

    Each client's own held-out rows were asked of its own model alone: its answers stand as they are.
    """
    labels = {client: _label(name, client) for client in parts}
    own = [load_samples(run.folder.root, label) for label in labels.values()]
    scores, samples = mean_over_models(
        [_without_own(part["scores"]) for part in parts.values()],
        [[sample for sample in samples if not sample["task"].startswith(HELD_OUT)] for samples in own],
    )
    answered = [sample for samples in own for sample in samples if sample["task"].startswith(HELD_OUT)]
    scores, samples = {**scores, **scores_of_rows(answered)}, [*samples, *answered]
    files = [read_json(run.folder.evaluation / f"{label}.json", dict) for label in labels.values()]
    save_evaluation(run.folder.root, name, samples, merged_details(files))
    kept = {
        "model": name,
        "settings": next(iter(parts.values()))["settings"],
        "scores": scores,
        "clients": {client: part["scores"] for client, part in parts.items()},
        "seconds": sum(part["seconds"] for part in parts.values()),
        "notes": list(dict.fromkeys(note for part in parts.values() for note in part.get("notes", []))),
    }
    return _keep(run, name, kept)


def _without_own(scores: Mapping[str, Any]) -> dict[str, Any]:
    return {source: metrics for source, metrics in scores.items() if not source.startswith(HELD_OUT)}


def _label(model: str, client: str) -> str:
    """Return what the files of a model's scores are called, of which every client may have its own."""
    return model if client == MERGED else f"{model}.{file_stem(client)}"


def _score(
    run: Run,
    name: str,
    words: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Asked,
    settings: dict[str, Any],
    others: KeptScores | None,
) -> dict[str, Any]:
    """Score one model, say so in ``words``, and keep the scores under ``name``."""
    result, taken = ask(run, words, model, tokenizer, asked, settings, others)
    save_evaluation(run.folder.root, name, result.samples, result.lm_eval)
    notes = [f"{name}: {note}" for note in result.notes]
    if taken is not None and others is not None and not others.of_study:  # a comparison's runs share all they can
        notes.append(f"{name}: scores taken over from an equal evaluation ({taken})")
    kept = {"model": name, "settings": settings, "scores": result.scores, "seconds": result.seconds, "notes": notes}
    kept = _keep(run, name, kept)
    run.display.say(f"evaluated {words}: {_shown(result)}{result.seconds:.0f} s")
    for note in notes:
        run.display.say(note)
    return kept


def _shown(result: EvaluationResult) -> str:
    """Return the mean score in words; nothing where sources have no metric in common."""
    metric = headline_of(name for name, value in result.mean.items() if value is not None)
    if metric is None:
        return ""
    value = result.mean[metric]
    assert value is not None  # it was picked so
    return f"mean {metric} {100 * value:.1f} %  " if facts(metric).share else f"mean {metric} {value:.3f}  "
