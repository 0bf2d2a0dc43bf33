"""What a recipe asks of its models, and which evaluators do it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedproxy.config import RunConfig
from fedproxy.data.rows import Row
from fedproxy.evaluation.chat import ChatFormat
from fedproxy.evaluation.evaluators import Evaluator
from fedproxy.evaluation.evaluators.base import Asked
from fedproxy.modules.trainer import autocast_dtype
from fedproxy.pipeline.data import evaluation_rows
from fedproxy.pipeline.unseen import check_unseen_tasks

HELD_OUT = "held_out/"
"""What names of sources begin with whose rows clients hold out (``data.holdout``)."""


def asked_of(config: RunConfig) -> Asked:
    """Return what the recipe asks of every model.

    Raises:
        DataError: If held-out rows cannot be read.
        ConfigError: If they, or a task's questions, are also trained on.
        EvaluationError: If a task file cannot be used.
    """
    check_unseen_tasks(config)
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


def held_out_rows(clients: Mapping[str, Sequence[Row]]) -> dict[str, list[Row]]:
    """Return the rows that clients hold out, by source: under the owner that a column names, else their task or file.

    Whoever owns the rows, the sources and their rows are the same, so that methods with other clients pair up.
    """
    found: dict[str, list[Row]] = {}
    for row in sorted((row for own in clients.values() for row in own), key=lambda row: row.key):
        found.setdefault(f"{HELD_OUT}{row.owner or row.source}", []).append(row)
    return dict(sorted(found.items()))


def with_rows(asked: Asked, rows: Mapping[str, Sequence[Row]]) -> Asked:
    """Return what is asked with further held-out rows."""
    return replace(asked, rows={**asked.rows, **rows})


def asking(config: RunConfig, asked: Asked) -> dict[str, Evaluator]:
    """Return the evaluators that have something to ask, by name."""
    return {name: member for name, member in config.evaluation.members.items() if member.sources(asked)}


def asked_sha256(config: RunConfig, asked: Asked) -> dict[str, Any]:
    """Return, by evaluator, what tells its questions from others; none where only names of the recipe say so."""
    found = {name: member.fingerprint(asked) for name, member in asking(config, asked).items()}
    return {name: value for name, value in found.items() if value}
