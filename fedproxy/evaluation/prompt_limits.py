"""Whether a model's positions have room for the prompts: looked at before any work, and said where they do not."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from fedproxy.errors import EvaluationError, first_line
from fedproxy.evaluation.chat import PLAIN, ChatFormat
from fedproxy.evaluation.loaded_task import LENGTH_KEYS, LoadedTask

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_GENERATED = 256
"""Tokens that lm-eval generates where a task does not say how many."""


@dataclass(frozen=True)
class Limits:
    """What the positions of a model mean for one task."""

    notes: tuple[str, ...] = ()
    """What is cut, in a sentence each."""
    answer_tokens: int | None = None
    """Most tokens of a generated answer, where the task's own number has no room; else None."""


def positions(config: "PretrainedConfig", tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the longest sequence that lm-eval gives a model, in tokens."""
    from lm_eval.models.huggingface import HFLM

    known = SimpleNamespace(config=config)
    length: int = HFLM.max_length.fget(
        SimpleNamespace(
            _max_length=None, model=known, tokenizer=tokenizer, _DEFAULT_MAX_LENGTH=HFLM._DEFAULT_MAX_LENGTH
        )
    )
    return length


def prompt_limits(
    task: LoadedTask,
    tokenizer: "PreTrainedTokenizerBase",
    most: int,
    *,
    limit: int | None,
    num_fewshot: int,
    seed: int,
    chat: ChatFormat = PLAIN,
) -> Limits:
    """Write a task's prompts as its evaluation will, and return what does not fit into ``most`` positions.

    Raises:
        EvaluationError: If a prompt cannot be written, an answer has no tokens or more than there are positions, or no
            position is left for a generated one.
    """
    notes = []
    if num_fewshot and not task.shots(num_fewshot):
        notes.append(f"{task.name} is asked without solved examples: its own definition fixes their number at 0.")
    elif num_fewshot and task.examples_are_scored:
        notes.append(f"{task.name} has no other rows: its solved examples are scored questions, none before itself.")
    asked = _requests(task, tokenizer, limit, num_fewshot, seed, chat)
    kinds = {instance.request_type for instance in asked}
    way_out = "lower num_fewshot" if task.shots(num_fewshot) else "use a model with more positions"
    room = None
    if "generate_until" in kinds:
        cut, room = _generation(task, asked, tokenizer, most, way_out)
        if room is not None:
            notes.append(f"{task.name}: an answer has at most {room} tokens, what {most} positions leave the prompts.")
    else:
        cut = _too_long(task, asked, tokenizer, most)
    if cut:
        questions = len({instance.doc_id for instance in asked})
        notes.append(
            f"{task.name}: {len(cut)} of {questions} prompts are longer than {most} positions allow and lose their "
            f"beginning; {way_out}."
        )
    return Limits(tuple(notes), room)


def _requests(
    task: LoadedTask,
    tokenizer: "PreTrainedTokenizerBase",
    limit: int | None,
    num_fewshot: int,
    seed: int,
    chat: ChatFormat,
) -> Sequence[Any]:
    """Return lm-eval's requests of a task, with the examples that its evaluation draws."""
    task.prepare(num_fewshot, seed)
    try:
        task.task.build_all_requests(limit=limit, rank=0, world_size=1, **chat.request_options(tokenizer))
    except Exception as error:  # templates and functions of a task raise whatever they like on a row
        raise EvaluationError(
            f"task {task.name!r}: a prompt cannot be written ({type(error).__name__}: {first_line(error)}); correct "
            "the row or the task, or leave the task out"
        ) from error
    found: Sequence[Any] = task.task.instances
    return found


def _too_long(task: LoadedTask, asked: Sequence[Any], tokenizer: "PreTrainedTokenizerBase", most: int) -> set[int]:
    """Return the documents of which a context and an answer are longer than ``most`` + 1 tokens."""
    scored = [instance for instance in asked if instance.request_type == "loglikelihood"]
    for instance in scored:
        if not instance.args[1]:
            raise EvaluationError(
                f"task {task.name!r}: question {instance.doc_id} has an empty answer; correct the row"
            )
    pairs = [instance for instance in scored if _may_exceed(instance.args[0] + instance.args[1], most)]
    wholes = _lengths([instance.args[0] + instance.args[1] for instance in pairs], tokenizer)
    long = [instance for instance, length in zip(pairs, wholes, strict=True) if length > most + 1]
    for instance, length in zip(long, _lengths([instance.args[1] for instance in long], tokenizer), strict=True):
        if length > most:
            raise EvaluationError(
                f"task {task.name!r}: an answer of question {instance.doc_id} has {length} tokens, the model has "
                f"{most} positions; leave the task out or use a model with more"
            )
    return {instance.doc_id for instance in long}


def _generation(
    task: LoadedTask, asked: Sequence[Any], tokenizer: "PreTrainedTokenizerBase", most: int, way_out: str
) -> tuple[set[int], int | None]:
    """Return the documents whose prompts are cut, and the tokens left for an answer if the task asks for too many."""
    wanted = max(_wanted(instance.args[1]) for instance in asked)
    room = most - wanted
    prompts = [instance for instance in asked if room < 1 or _may_exceed(instance.args[0], room)]
    lengths = _lengths([instance.args[0] for instance in prompts], tokenizer)
    if room >= 1:
        return {instance.doc_id for instance, length in zip(prompts, lengths, strict=True) if length > room}, None
    left = most - max(lengths)
    if left < 1:
        raise EvaluationError(
            f"task {task.name!r} generates up to {wanted} tokens after prompts of up to {max(lengths)}, the model has "
            f"{most} positions; {way_out}, or leave the task out"
        )
    return set(), left


def _wanted(arguments: dict[str, Any]) -> int:
    return next((int(arguments[key]) for key in LENGTH_KEYS if arguments.get(key) is not None), _GENERATED)


def _may_exceed(text: str, most: int) -> bool:
    """Tell whether a text may have more than ``most`` tokens: it has hardly ever more than bytes."""
    return 2 * len(text.encode()) + 16 > most


def _lengths(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    from fedproxy.data.tokenisation import encoding

    with encoding():
        return [length for part in _parts(texts) for length in map(len, tokenizer(part, verbose=False)["input_ids"])]


def _parts(texts: Sequence[str]) -> Iterator[list[str]]:
    for start in range(0, len(texts), 1024):
        yield list(texts[start : start + 1024])
