"""Held-out rows of one's own as an evaluator."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fedproxy.evaluation.evaluators.base import Asked, Evaluator, Progress

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from fedproxy.evaluation.own_data import OwnDataSettings
    from fedproxy.evaluation.results import EvaluationResult


@dataclass(frozen=True)
class OwnData(Evaluator, name="own_data"):
    """Scores held-out prompts and answers: ``evaluation.files``, and each client's own held-out rows."""

    answers: Literal["auto", "short", "long"] = "auto"
    """How generated answers are judged: exact match and token F1 (short), or ROUGE-L (long); auto takes short where
    nine of ten right answers of a source have at most 10 words."""
    max_new_tokens: int = 64
    """Most tokens of a generated answer; 0 generates none, and rows are scored by their answer's likelihood alone."""
    max_prompt_tokens: int | None = None
    """Longer prompts lose their beginning; null leaves them all that the model has room for."""
    stop: list[str] = field(default_factory=list)
    """A generated answer ends before the first of these texts, beside at its end token."""
    limit: int | None = None
    """The first so many rows of each source; null is all."""

    always: ClassVar[bool] = True
    headline: ClassVar[str] = "answer_nll"

    def __post_init__(self) -> None:
        self.require("max_new_tokens", self.max_new_tokens >= 0, "at least 0")
        for option in ("max_prompt_tokens", "limit"):
            value = getattr(self, option)
            self.require(option, value is None or value >= 1, "at least 1, or null")
        self.require("stop", all(self.stop), "a list of texts, none of them empty")

    def sources(self, asked: Asked) -> list[str]:
        """Return the names of the rows' sources."""
        return list(asked.rows)

    def notes(self, asked: Asked, config: "PretrainedConfig", tokenizer: "PreTrainedTokenizerBase") -> list[str]:
        """Return how many rows will be cut."""
        from fedproxy.evaluation.own_data import own_data_notes

        return own_data_notes(asked.rows, self._settings(), config, tokenizer)

    def fingerprint(self, asked: Asked) -> Any:
        """Return the hash of each source's rows."""
        from fedproxy.evaluation.own_data import rows_sha256

        return {source: rows_sha256(rows) for source, rows in asked.rows.items()}

    def score(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        asked: Asked,
        *,
        progress: Progress | None = None,
    ) -> "EvaluationResult":
        """Score a model on the rows."""
        from fedproxy.evaluation.own_data import score_rows

        return score_rows(
            model,
            tokenizer,
            asked.rows,
            self._settings(),
            batch_tokens=asked.batch_tokens,
            autocast=asked.autocast,
            progress=progress,
        )

    def _settings(self) -> "OwnDataSettings":
        from fedproxy.evaluation.own_data import OwnDataSettings

        return OwnDataSettings(self.answers, self.max_new_tokens, self.max_prompt_tokens, self.stop, self.limit)
