"""An lm-eval task and the few questions that the rest of this package asks it."""

from typing import Any, Literal

from fedproxy.data.rows import Row
from fedproxy.errors import EvaluationError
from fedproxy.evaluation.offline_tasks import OfflineTask

Split = Literal["test", "validation"]


class LoadedTask:
    """One lm-eval task and what it was configured with."""

    def __init__(self, task: Any, offline: OfflineTask | None, split: Split | None) -> None:
        """Wrap lm-eval's ``task`` (from our file ``offline`` if it has one), to be scored on ``split``.

        Raises:
            EvaluationError: If the task has no such split.
        """
        self.task, self.offline = task, offline
        self.name: str = task.get_config("task")
        self._num_fewshot: int | None = task.get_config("num_fewshot")
        if split is not None and not (task.has_test_docs() if split == "test" else task.has_validation_docs()):
            raise EvaluationError(f"task {self.name!r} has no {split} split; leave evaluation.split null")
        if split == "validation":
            task.set_config(key="test_split", value=None)

    @property
    def multiple_choice(self) -> bool:
        """Whether every document is a question with choices that are scored by log-likelihood."""
        return bool(self.task.OUTPUT_TYPE == "multiple_choice")

    @property
    def has_accuracy(self) -> bool:
        """Whether every document is answered right or wrong: what methods are compared by."""
        return not {"acc", "acc_norm"}.isdisjoint(self.task.aggregation())

    @property
    def only_means(self) -> bool:
        """Whether every metric is a mean, whose standard error needs no bootstrap."""
        return all(getattr(function, "__name__", "") == "mean" for function in self.task.aggregation().values())

    def prepare(self, num_fewshot: int, seed: int) -> None:
        """Set the number of solved examples (a task that fixes it at 0 keeps 0, as in lm-eval) and their seed."""
        self.task.set_config(key="num_fewshot", value=0 if self._num_fewshot == 0 else num_fewshot)
        self.task.set_fewshot_seed(seed=seed)

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
        if self.offline is None:
            return config
        metadata = {**(config.get("metadata") or {}), "config_source": f"fedproxy/{self.name}.yaml"}
        return {**config, "dataset_kwargs": self.offline.config["dataset_kwargs"], "metadata": metadata}
