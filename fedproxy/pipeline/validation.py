"""Validation between rounds: held-out rows that no client owns, scored in the process that holds the models."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedproxy.config import RunConfig
from fedproxy.data.conversations import prompt_and_answer
from fedproxy.data.rows import Row
from fedproxy.errors import ConfigError
from fedproxy.evaluation.validation import Question, row_questions, score_questions, task_questions
from fedproxy.federation.server.validation import RoundValidation, Scores
from fedproxy.models import placed
from fedproxy.models.decoder import Overlay
from fedproxy.modules.trainer import autocast_dtype
from fedproxy.pipeline.asked import asked_of
from fedproxy.pipeline.context import Run
from fedproxy.pipeline.data import file_rows, target_tokenizer
from fedproxy.reporting import ValidationReport
from fedproxy.seeding import derive_seed
from fedproxy.strategies.trainable.base import TrainableModel


def held_out(config: RunConfig, clients: Mapping[str, Sequence[Row]]) -> list[Question]:
    """Return the validation questions of a run: for every task and file the same number, none of them a client's.

    Raises:
        DataError: If clients leave too few rows.
        ConfigError: If a source cannot be scored by the metric that chooses the best round.
    """
    settings = config.federation.validation
    if not settings.every:
        return []
    if settings.evaluator is not None:
        if not config.evaluation.members[settings.evaluator].sources(asked_of(config)):
            lacking = "tasks or files in evaluation" if config.evaluation.models else "models in evaluation.models"
            raise ConfigError(
                f"federation.validation.evaluator: {settings.evaluator} has nothing to ask; name {lacking}, or leave "
                "the key null"
            )
        return []
    owned = [row for own in clients.values() for row in own]
    seed = derive_seed(config.seed, "validation")
    questions: list[Question] = []
    for task in config.data.tasks:
        questions += task_questions(task, settings.rows, owned, seed)
    for name in config.data.files:
        rows = file_rows(config.data, name)
        questions += _framed(row_questions(name, rows, settings.rows, owned, seed), rows, config)
    for question in questions:
        if settings.metric not in ("answer_nll", *question.accuracies):
            raise ConfigError(
                f"federation.validation.metric: {question.source!r} has no {settings.metric}; "
                f"choose {' or '.join((*question.accuracies, 'answer_nll'))}"
            )
    return questions


def _framed(questions: Sequence[Question], rows: Sequence[Row], config: RunConfig) -> list[Question]:
    """Return questions with the texts that a model is given and should write where they come from conversations."""
    by_key = {row.key: row for row in rows}
    if not any(by_key[question.key].messages for question in questions):
        return list(questions)
    tokenizer = target_tokenizer(config)
    return [replace(one, requests=(prompt_and_answer(by_key[one.key], tokenizer),)) for one in questions]


def round_validation(
    run: Run, model: TrainableModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]
) -> RoundValidation | None:
    """Return what scores the state between rounds, or None where the recipe asks for nothing."""
    settings = run.config.federation.validation
    if not settings.every:
        return None
    fused = _fused(run, model)
    evaluator = None if settings.evaluator is None else run.config.evaluation.members[settings.evaluator]
    asked = None if evaluator is None else run.asked

    def score(state: Mapping[str, Tensor]) -> Scores:
        model.load_state(state)
        candidate = model.model if settings.model == "proxy" else fused()
        with placed(candidate, run.device):
            if evaluator is not None and asked is not None:
                result = evaluator.score(candidate, tokenizer, asked)
                return {**result.scores, "mean": result.mean}
            return score_questions(candidate, tokenizer, questions, autocast_dtype(run.config.trainer))

    return RoundValidation(score, settings.every, settings.metric, settings.select == "best")


def validation_report(run: Run) -> ValidationReport | None:
    """Return what the report says of validation: how rounds were scored, and which one's state was fused."""
    settings = run.config.federation.validation
    scored = [record["validation"] for record in run.folder.rounds() if "validation" in record]
    if not scored:
        return None
    return ValidationReport(
        model=settings.model,
        metric=_metric(run.config),
        select=settings.select,
        questions=int(scored[-1]["mean"]["n"]),
        evaluator=settings.evaluator,
        fused_after_round=run.facts.fused_after_round,
    )


def _metric(config: RunConfig) -> str:
    settings = config.federation.validation
    return settings.metric if settings.evaluator is None else config.evaluation.members[settings.evaluator].headline


def _fused(run: Run, model: TrainableModel) -> Callable[[], PreTrainedModel]:
    """Return what fuses the proxy as it stands into the target; the plain proxy is loaded once, when first needed."""
    plain: dict[str, Tensor] = {}

    def fuse() -> PreTrainedModel:
        if not plain:
            plain.update(run.proxy().state_dict())
        after = Overlay(plain, model.merged_weights())
        return run.config.fusion.join(run.fusible_target, plain, after, run.layer_map)

    return fuse
