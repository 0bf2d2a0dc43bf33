"""What a recipe asks of its models, and which evaluators do it."""

from typing import Any

from fedproxy.config import RunConfig
from fedproxy.evaluation.chat import ChatFormat
from fedproxy.evaluation.evaluators import Evaluator
from fedproxy.evaluation.evaluators.base import Asked
from fedproxy.modules.trainer import autocast_dtype
from fedproxy.pipeline.data import evaluation_rows


def asked_of(config: RunConfig) -> Asked:
    """Return what the recipe asks of every model.

    Raises:
        DataError: If held-out rows cannot be read.
        ConfigError: If they are also trained on.
    """
    own = config.evaluation
    return Asked(
        tasks=tuple(config.evaluation_tasks),
        rows=evaluation_rows(config) if own.models else {},
        limit=own.limit,
        num_fewshot=own.num_fewshot,
        seed=own.seed,
        chat=ChatFormat(own.apply_chat_template, own.fewshot_as_multiturn, own.system_instruction),
        batch_tokens=own.batch_tokens,
        autocast=autocast_dtype(config.trainer),
    )


def asking(config: RunConfig, asked: Asked) -> dict[str, Evaluator]:
    """Return the evaluators that have something to ask, by name."""
    return {name: member for name, member in config.evaluation.members.items() if member.sources(asked)}


def asked_sha256(config: RunConfig) -> dict[str, Any]:
    """Return, by evaluator, what tells its questions from others; none where only names of the recipe say so."""
    asked = asked_of(config)
    found = {name: member.fingerprint(asked) for name, member in asking(config, asked).items()}
    return {name: value for name, value in found.items() if value}
