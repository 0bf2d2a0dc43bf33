"""`python -m fedproxy.evaluate`: score a model on lm-eval tasks and on held-out rows of one's own."""

import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fedproxy.command import run_command
from fedproxy.evaluation.questions import Questions

if TYPE_CHECKING:
    import torch

    from fedproxy.evaluation.harness import EvaluationResult

USAGE = """
usage: python -m fedproxy.evaluate model=MODEL tasks=[TASK,...] files.NAME=FILE [key=value ...]

Scores a causal language model with lm-eval, and on rows of your own, and writes scores.json, samples.jsonl and
lm-eval's own results.json.

  model         a from_pretrained folder, asset:NAME (fetched if missing) or a hub id
  tasks         lm-eval task names; docs/evaluation.md lists those with local data (assets qa, glue, open-qa, exams,
                tiny-qa), and says how to write a task file of your own, my_task.yaml
  include_path  folder of task files, whose tasks, tags and groups have their own names  (null)
  files.NAME    held-out rows with a prompt and a target each: answer NLL, and generated answers
  max_new_tokens  most tokens of an answer to these rows; 0 generates none (64)
  limit         only the first questions of each task; null is all       (null)
  num_fewshot   solved examples before each question                     (0)
  split         test or validation; null is lm-eval's choice             (null)
  seed          seed of the few-shot sampler                             (1234)
  apply_chat_template  ask tasks through the tokenizer's chat template   (false)
  fewshot_as_multiturn  with it, solved examples as turns                (false)
  system_instruction  what the system says before a task's question      (null)
  dtype         float32, bfloat16 or float16                             (float32)
  device        cpu, cuda, cuda:1, mps; null takes a GPU if there is one (null)
  batch_size    sequences per forward where no prefix can be shared      (16)
  batch_tokens  tokens per forward where prefixes are shared             (2048)
  output_dir    folder of the result files                               (evaluation)
  overwrite     replace results that lie there                           (false)

examples:
  python -m fedproxy.evaluate model=asset:smollm2-135m tasks=[arc_easy,openbookqa] limit=100
  python -m fedproxy.evaluate model=runs/demo/fused tasks=[csqa] num_fewshot=5 output_dir=runs/demo/csqa_5shot
  python -m fedproxy.evaluate model=runs/demo/fused files.ward=held_out.jsonl max_new_tokens=32
"""


_FILES = ("scores.json", "samples.jsonl", "results.json")


@dataclass(frozen=True)
class EvaluateArguments(Questions):
    """What the command line can say; see ``USAGE``."""

    model: str = ""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str | None = None
    output_dir: str = "evaluation"
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Check that a model is named, and what :class:`Questions` checks; else a ConfigError."""
        from fedproxy.errors import ConfigError

        if not self.model:
            raise ConfigError("model is missing; write, for example, model=asset:smollm2-135m")
        if not self.output_dir.strip():
            raise ConfigError("output_dir must be a folder, got an empty text; give one, . for this folder")
        super().__post_init__()


def parse_arguments(arguments: Sequence[str]) -> EvaluateArguments:
    """Return the typed arguments.

    Raises:
        ConfigError: If one has no ``=``, is unknown, is of another type, or model or tasks are missing.
    """
    from fedproxy.config.loading import build
    from fedproxy.config.loading import parse_arguments as parse_words
    from fedproxy.config.references import resolve
    from fedproxy.errors import ConfigError, nearest

    known = [option.name for option in dataclasses.fields(EvaluateArguments)]
    for argument in arguments:
        key, equals, _ = argument.partition("=")
        if not equals:
            raise ConfigError(f"{argument!r} is no key=value argument; write, for example, limit=100")
        if key.partition(".")[0] not in known:
            raise ConfigError(f"unknown argument {key!r}{nearest(key, known)}")
    words = parse_words([_as_list(argument) for argument in arguments], EvaluateArguments)
    options: EvaluateArguments = build(EvaluateArguments, resolve(words), "")
    return options


def _as_list(argument: str) -> str:
    """Return ``tasks=a,b`` as ``tasks=[a,b]``, and any other argument as it is."""
    key, _, value = argument.partition("=")
    return f"tasks=[{value}]" if key == "tasks" and value and not value.startswith("[") else argument


def main(arguments: Sequence[str]) -> None:
    """Evaluate the model that the arguments name, write the result files and print the scores.

    Raises:
        FedProxyError: If an argument, the model or a task cannot be used, or ``output_dir`` holds foreign files.
    """
    from fedproxy.files import at_home
    from fedproxy.locks import locked

    options = parse_arguments(arguments)
    folder = at_home(options.output_dir)
    with locked(folder):
        _check_folder(folder, options.overwrite)
        result = _evaluate(options)
        _write(options, result, folder)
    print(score_table(result))
    print("".join(f"note: {note}\n" for note in result.notes), end="")
    print(f"results: {folder}/scores.json, samples.jsonl and results.json")


def _check_folder(folder: Path, overwrite: bool) -> None:
    """Refuse to replace files that no evaluation wrote, and scores without the word for it.

    Raises:
        ConfigError: Naming the first such file.
    """
    from fedproxy.errors import CheckpointError, ConfigError
    from fedproxy.files import read_json

    scores, *others = (folder / name for name in _FILES)
    if not os.path.lexists(scores):
        for other in others:
            if os.path.lexists(other):
                raise ConfigError(f"{other} was written by something else; move it away or choose another output_dir")
        return
    if not overwrite:
        raise ConfigError(f"{folder} already holds scores; add overwrite=true or choose another output_dir")
    try:
        content = read_json(scores, dict)
    except CheckpointError:
        content = {}
    if not {"settings", "scores", "seconds"} <= content.keys():
        raise ConfigError(f"{scores} was written by something else; move it away or choose another output_dir")


def _evaluate(options: EvaluateArguments) -> "EvaluationResult":
    from fedproxy.data.assets import resolve
    from fedproxy.models import load_model, load_tokenizer
    from fedproxy.models.checkpoints import check_loadable

    device = _device(options.device)
    options.check()
    path = str(resolve(options.model) or options.model)
    tokenizer = load_tokenizer(path)
    for note in options.notes(check_loadable(path), tokenizer):  # before weights are loaded
        print(f"note: {note}", file=sys.stderr)
    return options.ask(load_model(path, dtype=options.dtype).to(device), tokenizer, progress=True)


def _device(name: str | None) -> "torch.device":
    """Return the device of that name, on which a number was kept and read; None takes a GPU if there is one.

    Raises:
        ConfigError: If this machine cannot use it.
    """
    import torch

    from fedproxy.errors import ConfigError, first_line

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except Exception as error:  # each kind of device fails in its own way
        raise ConfigError(
            f"device={name} cannot be used here ({first_line(error)}); give cpu, cuda, cuda:1 or mps"
        ) from error
    return device


def _write(options: EvaluateArguments, result: "EvaluationResult", folder: Path) -> None:
    from fedproxy.files import write_json, write_text
    from fedproxy.reporting.samples import sample_lines

    settings = dataclasses.asdict(options)
    scores = {"settings": settings, "scores": {**result.scores, "mean": result.mean}, "seconds": result.seconds}
    scores["notes"] = result.notes
    write_json(folder / _FILES[0], scores)  # first: by it the others are known as ours
    write_text(folder / _FILES[1], sample_lines(result.samples))
    write_json(folder / _FILES[2], result.lm_eval)


_FURTHER = ("exact_match", "f1", "em", "rouge_l")


def score_table(result: "EvaluationResult") -> str:
    """Return shares in percent with standard errors and the answer NLL in nats per token, a line per task."""
    further = [name for name in _FURTHER if any(name in scores for scores in result.scores.values())]
    heads = "".join(f" {name:>14}" for name in further)
    lines = [f"{'task':<16} {'n':>6} {'acc':>14} {'acc_norm':>14} {'answer NLL':>11}{heads}"]
    rows: list[tuple[str, Mapping[str, float | None]]] = [*result.scores.items(), ("mean", result.mean)]
    for name, scores in rows:
        nll = scores.get("answer_nll")
        cells = [_percent(scores, "acc"), _percent(scores, "acc_norm"), "-" if nll is None else f"{nll:.3f}"]
        more = "".join(f" {_percent(scores, metric):>14}" for metric in further)
        lines.append(f"{name:<16} {scores.get('n') or 0:>6.0f} {cells[0]:>14} {cells[1]:>14} {cells[2]:>11}{more}")
    return "\n".join(lines)


def _percent(scores: Mapping[str, float | None], metric: str) -> str:
    value, stderr = scores.get(metric), scores.get(f"{metric}_stderr")
    if value is None:
        return "-"
    return f"{100 * value:.1f}" + ("" if stderr is None else f" ± {100 * stderr:.1f}")


if __name__ == "__main__":
    run_command(main, USAGE)
