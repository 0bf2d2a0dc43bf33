"""What one model is asked outside of a run; nothing heavy is imported before it is asked."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fedproxy.errors import ConfigError
from fedproxy.evaluation.chat import ChatFormat
from fedproxy.names import check_names, folded

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from fedproxy.data.rows import Row
    from fedproxy.evaluation.evaluators.own_data import OwnData
    from fedproxy.evaluation.results import EvaluationResult


@dataclass(frozen=True)
class Questions:
    """Tasks of lm-eval, held-out rows of one's own, or both, and how they are asked.

    Raises:
        ConfigError: If nothing is asked, or options do not go together.
    """

    tasks: list[str] = field(default_factory=list)
    """Names of lm-eval's tasks, or task files (.yaml) of one's own."""
    include_path: str | None = None
    """Folder of task files, whose tasks, tags and groups may then be called by their own names."""
    files: dict[str, str] = field(default_factory=dict)
    """Held-out rows with a prompt and a target each: name to file, folder or hub id."""
    max_new_tokens: int = 64
    """Most tokens of a generated answer to these rows; 0 generates none."""
    limit: int | None = None
    """Only the first questions of each task; None is all."""
    num_fewshot: int = 0
    """Solved examples before each question of a task."""
    split: str | None = None
    """``test`` or ``validation``; None is lm-eval's choice."""
    seed: int = 1234
    """Seed of the few-shot sampler."""
    apply_chat_template: bool = False
    """Ask tasks through the tokenizer's chat template."""
    fewshot_as_multiturn: bool = False
    """With it: solved examples as turns."""
    system_instruction: str | None = None
    """What the system says before a task's question."""
    batch_size: int = 16
    """Sequences per forward where no prefix can be shared."""
    batch_tokens: int = 2048
    """Tokens per forward where prefixes are shared."""

    def __post_init__(self) -> None:
        """Check that something is asked, and that its options go together; else a ConfigError."""
        if isinstance(self.tasks, str):
            raise ConfigError(f"tasks must be a list of names, got the text {self.tasks!r}; write [{self.tasks!r}]")
        if not self.tasks and not self.files:
            raise ConfigError("tasks is missing; write, for example, tasks=[arc_easy]")
        if self.fewshot_as_multiturn and not self.apply_chat_template:
            raise ConfigError("fewshot_as_multiturn needs apply_chat_template=true; add it")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit must be at least 1, or null for all questions, got {self.limit}")
        for key, least in (("max_new_tokens", 0), ("num_fewshot", 0), ("batch_size", 1), ("batch_tokens", 1)):
            if getattr(self, key) < least:
                raise ConfigError(f"{key} must be at least {least}, got {getattr(self, key)}")
        check_names(self.files, "files")
        _check_names(self.files, self.tasks)

    def check(self) -> None:
        """Read the rows, fetch what tasks need, and refuse what cannot be asked of any model.

        Raises:
            FedProxyError: If a task is unknown or has no data, a row cannot be used, or a setting does not fit.
        """
        _ = self._rows, self._single

    def notes(self, config: "PretrainedConfig", tokenizer: "PreTrainedTokenizerBase") -> list[str]:
        """Return what a model of that configuration has no room for, a sentence each; its weights are not needed.

        Raises:
            FedProxyError: If a task or a row cannot be asked.
        """
        from fedproxy.evaluation.harness import prompt_notes
        from fedproxy.evaluation.own_data import own_data_notes

        rows, single = self._rows, self._single
        notes = prompt_notes(config, tokenizer, single, **self._options) if single else []
        return [*notes, *(own_data_notes(rows, self._own, config, tokenizer) if rows else [])]

    def ask(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        *,
        progress: bool | Callable[[int, int], None] = False,
    ) -> "EvaluationResult":
        """Score a model, on the device that it is on.

        Args:
            model: The model; its weights are not changed and its training mode is restored.
            tokenizer: Its tokenizer.
            progress: True shows a bar for tasks, a function is called with (done, total).

        Raises:
            FedProxyError: If the model is not causal, or a task or a row cannot be asked.
        """
        from fedproxy.evaluation.harness import evaluate_model
        from fedproxy.evaluation.own_data import score_rows
        from fedproxy.evaluation.results import merged
        from fedproxy.models.modes import evaluating
        from fedproxy.models.probing import check_causal

        rows, single, results = self._rows, self._single, []
        with evaluating(model):
            check_causal(model, remedy="give a decoder-only causal LM")
        if single:
            sizes: dict[str, Any] = {"batch_size": self.batch_size, "batch_tokens": self.batch_tokens}
            results.append(evaluate_model(model, tokenizer, single, progress=progress, **sizes, **self._options))
        if rows:
            results.append(score_rows(model, tokenizer, rows, self._own, batch_tokens=self.batch_tokens))
        return merged(results)

    @cached_property
    def _rows(self) -> "dict[str, list[Row]]":
        from fedproxy.data.sources import ending, read_rows

        return {name: ending(read_rows(name, str(file), split="test")) for name, file in self.files.items()}

    @cached_property
    def _single(self) -> list[str]:
        """Tasks without tags and groups, whose data are there."""
        from fedproxy.data.assets import fetch
        from fedproxy.evaluation.harness import check_tasks, missing_assets
        from fedproxy.evaluation.task_loading import expand

        for asset in missing_assets(self.tasks):
            fetch(asset)
        single = expand(self.tasks, self.include_path)
        _check_names(self.files, single)
        if single:
            check_tasks(single, self.limit, self.num_fewshot, split=self._options["split"])
        return single

    @property
    def _options(self) -> dict[str, Any]:
        chat = ChatFormat(self.apply_chat_template, self.fewshot_as_multiturn, self.system_instruction)
        named = {name: getattr(self, name) for name in ("limit", "num_fewshot", "seed", "split")}
        return {**named, "chat": chat}

    @property
    def _own(self) -> "OwnData":
        from fedproxy.evaluation.evaluators.own_data import OwnData

        return OwnData(max_new_tokens=self.max_new_tokens)


def _check_names(files: Mapping[str, str], tasks: Sequence[str]) -> None:
    """Refuse a file whose scores would have the name of a task's, or of the mean.

    Raises:
        ConfigError: Naming it.
    """
    taken = {folded("mean"): "the mean over sources", **{folded(task): "a task" for task in tasks}}
    for name in files:
        if folded(name) in taken:
            raise ConfigError(f"files.{name} is also the name of {taken[folded(name)]}; name the file otherwise")
