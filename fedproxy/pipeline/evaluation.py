"""Scores of target, proxy, tuned proxy and fused model; each is kept on disk as soon as it is known."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedproxy.config import RunConfig, to_dict
from fedproxy.evaluation.harness import EvaluationResult, evaluate_model
from fedproxy.models import load_model, placed
from fedproxy.pipeline.folder import RunFolder, read_json
from fedproxy.pipeline.sharing import evaluation_key
from fedproxy.pipeline.stages import Run, TunedProxy
from fedproxy.plain_json import write_json
from fedproxy.reporting.samples import save_evaluation

Scores = dict[str, dict[str, float]]


def evaluate(run: Run, tuned: TunedProxy, rounds: int) -> Iterator[tuple[str, Scores]]:
    """Score the models that the recipe lists, one after another; results of an earlier session are reused.

    Yields:
        Model, and its scores: task to metric to value, without means.
    """
    _, tokenizer = run.target()
    models: Mapping[str, Callable[[], PreTrainedModel]] = {
        "target": lambda: run.target()[0],
        "proxy": lambda: tuned.proxy,
        "proxy_tuned": tuned.model,
        "fused": lambda: load_model(run.folder.fused, dtype=run.config.target.dtype),
    }
    for name in run.config.evaluation.models:
        settings = evaluation_settings(run.config, rounds if name in ("proxy_tuned", "fused") else 0)
        kept = read_json(scores_file(run.folder, name))
        if kept is None or kept["settings"] != settings:
            kept = _score(run, name, models[name](), tokenizer, settings)
        yield name, kept["scores"]


def scores_file(folder: RunFolder, name: str) -> Path:
    """Return where a model's scores are kept, with the settings that they were taken under."""
    return folder.evaluation / f"{name}.scores.json"


def evaluation_settings(config: RunConfig, rounds: int) -> dict[str, Any]:
    """Return what a model's scores depend on, besides the model: they are reused where it is the same."""
    settings = to_dict(config.evaluation)
    del settings["models"], settings["batch_tokens"]
    return {**settings, "tasks": config.evaluation_tasks, "rounds": rounds}


def _score(
    run: Run, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any]
) -> dict[str, Any]:
    evaluation = run.config.evaluation

    def score() -> EvaluationResult:
        with run.display.counter(f"evaluating {name}") as advance, placed(model, run.device):
            return evaluate_model(
                model,
                tokenizer,
                run.config.evaluation_tasks,
                limit=evaluation.limit,
                num_fewshot=evaluation.num_fewshot,
                batch_tokens=evaluation.batch_tokens,
                seed=evaluation.seed,
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
    run.display.say(f"evaluated {name}: {shown}{result.seconds:.0f} s")
    return kept
