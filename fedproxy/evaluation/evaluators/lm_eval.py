"""lm-eval's tasks as an evaluator."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fedproxy.evaluation.evaluators.base import Asked, Evaluator, Progress

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from fedproxy.evaluation.results import EvaluationResult


@dataclass(frozen=True)
class LmEval(Evaluator, name="lm_eval"):
    """Scores ``evaluation.tasks`` with lm-eval; its settings are the keys of ``evaluation`` itself."""

    always: ClassVar[bool] = True
    headline: ClassVar[str] = "acc_norm"

    def sources(self, asked: Asked) -> list[str]:
        """Return the tasks."""
        return list(asked.tasks)

    def check(self, asked: Asked) -> None:
        """Refuse unknown tasks, tasks without data, and more questions or examples than there are."""
        from fedproxy.evaluation.harness import check_tasks

        check_tasks(asked.tasks, asked.limit, asked.num_fewshot)

    def notes(self, asked: Asked, config: "PretrainedConfig", tokenizer: "PreTrainedTokenizerBase") -> list[str]:
        """Return which prompts will be cut."""
        from fedproxy.evaluation.harness import prompt_notes

        return prompt_notes(
            config,
            tokenizer,
            asked.tasks,
            limit=asked.limit,
            num_fewshot=asked.num_fewshot,
            seed=asked.seed,
            chat=asked.chat,
        )

    def fingerprint(self, asked: Asked) -> Any:
        """Return the hashes of task files of one's own; what else the tasks depend on, a run notes itself."""
        from fedproxy.evaluation.own_tasks import is_task_file, own_sha256

        return {name: own_sha256(name) for name in asked.tasks if is_task_file(name)}

    def score(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        asked: Asked,
        *,
        progress: Progress | None = None,
    ) -> "EvaluationResult":
        """Score a model on the tasks."""
        from fedproxy.evaluation.harness import evaluate_model

        return evaluate_model(
            model,
            tokenizer,
            asked.tasks,
            limit=asked.limit,
            num_fewshot=asked.num_fewshot,
            batch_tokens=asked.batch_tokens,
            seed=asked.seed,
            autocast=asked.autocast,
            chat=asked.chat,
            progress=progress or False,
        )
