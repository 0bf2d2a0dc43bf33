"""The base of the family ``evaluator``, and what all of its members are given."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from fedproxy.errors import ConfigError
from fedproxy.evaluation.chat import PLAIN, ChatFormat
from fedproxy.registry import Component

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from fedproxy.data.rows import Row
    from fedproxy.evaluation.results import EvaluationResult

Progress = Callable[[int, int], None]
"""Called with (requests done, requests in all)."""


@dataclass(frozen=True)
class Asked:
    """What every model of a run is asked; an evaluator takes its part of it."""

    tasks: Sequence[str] = ()
    """lm-eval tasks."""
    rows: Mapping[str, Sequence["Row"]] = field(default_factory=dict)
    """Held-out rows, by the name of their source."""
    limit: int | None = None
    """The first so many documents of each task; None is all."""
    num_fewshot: int = 0
    """Solved examples before each question of a task."""
    seed: int = 1234
    """Seed of the few-shot sampler."""
    chat: ChatFormat = PLAIN
    """How a question of a task becomes a prompt."""
    batch_tokens: int = 2048
    """Tokens per forward, padding included."""
    autocast: "torch.dtype | None" = None
    """Dtype of the matrix products before the head; None is the weights' own."""


@dataclass(frozen=True)
class Evaluator(Component, family="evaluator"):
    """Asks a model questions and scores its answers.

    Scores are kept by source (a task, a file, a client's rows) and metric. A metric that
    :mod:`fedproxy.metric_facts` does not know is declared there by the evaluator's module.
    """

    always: ClassVar[bool] = False
    """Whether it takes part without being named in ``evaluation.evaluators``."""
    headline: ClassVar[str] = ""
    """The metric that a model's line on the console shows; also which way is better is known of it."""

    def require(self, option: str, ok: bool, rule: str) -> None:
        """Raise a one-line ConfigError about ``option`` unless ``ok``; for use in ``__post_init__``."""
        if not ok:
            key = f"evaluation.evaluators.{self.name}.{option}"
            raise ConfigError(f"{key} must be {rule}, got {getattr(self, option)!r}")

    @abstractmethod
    def sources(self, asked: Asked) -> list[str]:
        """Return the names that scores will have, as far as they are known; none where there is nothing to ask."""

    def check(self, asked: Asked) -> None:
        """Refuse, before any work, what cannot be asked.

        Raises:
            FedProxyError: In one line.
        """

    def notes(self, asked: Asked, config: "PretrainedConfig", tokenizer: "PreTrainedTokenizerBase") -> list[str]:
        """Return what a model of that configuration has no room for, a sentence each, before it is loaded."""
        return []

    def fingerprint(self, asked: Asked) -> Any:
        """Return, as plain values, what tells these questions from others; None where nothing does.

        Scores are used again only where it is the same and not None.
        """
        return None

    @abstractmethod
    def score(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        asked: Asked,
        *,
        progress: Progress | None = None,
    ) -> "EvaluationResult":
        """Score a model; its weights and its training mode are left as they were.

        Every sample names its ``task`` and has a ``doc_hash``, by which two models' answers pair up, and one number
        per metric.

        Raises:
            FedProxyError: If a question cannot be asked of this model.
        """
