"""Held-out rows of one's own as an evaluator."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fedproxy.evaluation.evaluators.base import Asked, Evaluator, Progress

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from fedproxy.data.rows import Row
    from fedproxy.evaluation.results import EvaluationResult

SHORT_WORDS = 10
"""Most words of a short answer: a name, a number, a span of a text."""


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
        """Check the options."""
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

        return own_data_notes(asked.rows, self, config, tokenizer)

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
            self,
            batch_tokens=asked.batch_tokens,
            autocast=asked.autocast,
            progress=progress,
        )

    def taken(self, sources: Mapping[str, Sequence["Row"]]) -> dict[str, Sequence["Row"]]:
        """Return the rows that are asked, by source."""
        return {source: rows[: self.limit] for source, rows in sources.items()}

    def judged_as(self, rows: Sequence["Row"]) -> str:
        """Return whether the answers of a source are ``short`` or ``long``: by option, else what nine of ten are."""
        if self.answers != "auto":
            return self.answers
        brief = sum(len(row.target.split()) <= SHORT_WORDS for row in rows)
        return "short" if brief >= 0.9 * len(rows) else "long"
