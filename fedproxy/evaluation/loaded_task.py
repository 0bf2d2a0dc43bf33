"""An lm-eval task and the few questions that the rest of this package asks it."""

import copy
from collections.abc import Mapping
from typing import Any

from fedproxy.data.rows import Row
from fedproxy.errors import EvaluationError
from fedproxy.evaluation.offline_tasks import Split
from fedproxy.evaluation.solved_examples import choose_examples, example_count
from fedproxy.metric_facts import HEADLINES

LENGTH_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names under which lm-eval's tasks give the most tokens of a generated answer, the first one counts."""


class LoadedTask:
    """One lm-eval task and what it was configured with."""

    def __init__(self, task: Any, split: Split | None, public: Mapping[str, Any] | None = None) -> None:
        """Wrap lm-eval's ``task``, to be scored on ``split``.

        Args:
            task: lm-eval's task object.
            split: ``test`` or ``validation``; None is lm-eval's choice.
            public: What stands in for this machine's paths where the configuration is shown: ``dataset_kwargs`` and
                ``config_source``; None where lm-eval's own file holds none.

        Raises:
            EvaluationError: If the task has no such split, or asks for more than text.
        """
        self.task, self._public = task, public
        self.name: str = task.get_config("task")
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            reason = (
                "runs code that a model writes" if getattr(task, "UNSAFE_CODE", False) else "shows images or sounds"
            )
            raise EvaluationError(f"task {self.name!r} {reason}, which FedProxy does not do; leave it out")
        self._num_fewshot: int | None = task.get_config("num_fewshot")
        self._generation = copy.deepcopy(task.get_config("generation_kwargs"))
        if split is not None and not (task.has_test_docs() if split == "test" else task.has_validation_docs()):
            raise EvaluationError(f"task {self.name!r} has no {split} split; leave evaluation.split null")
        if split == "validation":
            task.set_config(key="test_split", value=None)
        self.examples_are_scored = choose_examples(task)

    @property
    def scored(self) -> Split:
        """The split that is scored."""
        return "test" if self.task.has_test_docs() else "validation"

    @property
    def multiple_choice(self) -> bool:
        """Whether every document is a question with choices that are scored by log-likelihood."""
        return bool(self.task.OUTPUT_TYPE == "multiple_choice")

    @property
    def headlines(self) -> set[str]:
        """The metrics by which methods can be compared."""
        likely = {"answer_nll"} if self.multiple_choice else set()
        return likely | set(HEADLINES) & set(self.task.aggregation())

    @property
    def only_means(self) -> bool:
        """Whether every metric is a mean, whose standard error needs no bootstrap."""
        return all(getattr(function, "__name__", "") == "mean" for function in self.task.aggregation().values())

    def shots(self, num_fewshot: int) -> int:
        """Return how many solved examples a question gets of those asked for: a task that fixes them at 0 has none."""
        return 0 if self._num_fewshot == 0 else num_fewshot

    @property
    def examples(self) -> int:
        """How many solved examples there are to draw from for one question."""
        return example_count(self.task)

    def prepare(self, num_fewshot: int, seed: int, answer_tokens: int | None = None) -> None:
        """Set the number of solved examples and their seed, and the most tokens of an answer that is generated.

        Args:
            num_fewshot: Solved examples before each question.
            seed: They are drawn anew from this seed.
            answer_tokens: Most tokens of a generated answer; None is the task's own number.
        """
        self.task.set_config(key="num_fewshot", value=self.shots(num_fewshot))
        self.task.set_fewshot_seed(seed=seed)
        if answer_tokens is not None:
            short = {key: value for key, value in self._generation.items() if key not in LENGTH_KEYS}
            self.task.set_config(key="generation_kwargs", value={**short, "max_gen_toks": answer_tokens})
        elif self._generation is not None:
            self.task.set_config(key="generation_kwargs", value=copy.deepcopy(self._generation))

    def check_rows(self, split: str) -> None:
        """Raise an EvaluationError unless the task has training rows in that split, each with one right answer."""
        if not self.multiple_choice:
            raise EvaluationError(
                f"data.tasks: {self.name} is not multiple choice ({self.task.OUTPUT_TYPE}), so it has no rows to train "
                "on; leave it to evaluation.tasks, and give such rows by data.files"
            )
        if self.docs(split) is None:
            raise EvaluationError(f"data.tasks: {self.name} has no {split} split to train on; leave it out")

    def docs(self, split: str) -> Any:
        """Return the documents of ``train``, ``validation`` or ``test`` as an indexable data set, or None."""
        docs = {"train": "training_docs", "validation": "validation_docs", "test": "test_docs"}[split]
        return getattr(self.task, docs)()

    def requests(self, doc: dict[str, Any]) -> list[tuple[str, str]]:
        """Return lm-eval's zero-shot (context, continuation) of every choice of a document."""
        context = self.task.fewshot_context(doc, 0, gen_prefix=self.task.doc_to_prefix(doc))
        instances = self.task.construct_requests(doc=doc, ctx=context, metadata=(self.name, 0, 1))
        choices = len(self.task.doc_to_choice(doc))
        return [(instance.args[0], instance.args[1]) for instance in instances[:choices]]

    def gold(self, doc: dict[str, Any]) -> int | None:
        """Return the index of the gold choice, by lm-eval's rule, or None where there is not exactly one."""
        gold = self.task.doc_to_text(doc) if self.task.multiple_input else self.task.doc_to_target(doc)
        choices = self.task.doc_to_choice(doc)
        if isinstance(gold, str):
            gold = choices.index(gold) if gold in choices else None
        return gold if isinstance(gold, int) and 0 <= gold < len(choices) else None

    def row(self, doc: dict[str, Any], split: str, index: int) -> Row:
        """Return a document as a training row: the context of the gold choice, and its continuation as the target.

        Raises:
            EvaluationError: If the document has not exactly one gold choice.
        """
        key, gold = f"{self.name}/{split}/{index}", self.gold(doc)
        if gold is None:
            raise EvaluationError(f"row {key} has no single gold choice; remove it or use another task")
        prompt, target = self.requests(doc)[gold]
        return Row(prompt=prompt, target=target, source=self.name, key=key, label=gold)

    def public_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return lm-eval's dump of the task's configuration without this machine's paths."""
        if self._public is None:
            return config
        metadata = {**(config.get("metadata") or {}), "config_source": self._public["config_source"]}
        return {**config, "dataset_kwargs": self._public["dataset_kwargs"], "metadata": metadata}
