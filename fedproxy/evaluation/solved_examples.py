"""Where the solved examples of few-shot prompts come from: never from the question that is being scored."""

from typing import Any


def choose_examples(task: Any) -> bool:
    """Let lm-eval's ``task`` draw its solved examples from rows that are not scored, where it has any.

    In this order: the split that the task's file names for them, unless that one is scored; examples that the file
    itself holds; the train split; the validation split where another is scored. Where only scored rows are left, they
    are drawn from those, and a question never gets itself.

    Returns:
        Whether the examples come from the scored rows.
    """
    settings = getattr(task, "fewshot_cfg", None)
    if settings is None or not hasattr(task, "sampler"):
        return False  # a task in Python draws by lm-eval's older rule: train, else other rows without the question
    config = task.config
    scored = config.test_split or config.validation_split
    if settings.split is not None and settings.split != scored:
        return False
    if settings.split is None and settings.samples is not None:
        return False
    for name, docs in ((config.training_split, task.training_docs), (config.validation_split, task.validation_docs)):
        if name not in (None, scored):
            if settings.split is not None:
                task.sampler.replace_df(list(docs()))
                settings.split = name
            return False
    task.sampler.replace_df(list(task.eval_docs))
    settings.split = config.test_split  # where the two are equal, lm-eval leaves the question out
    return True


def example_count(task: Any) -> int:
    """Return how many solved examples there are for one question."""
    if not hasattr(task, "sampler"):
        return len(task.fewshot_docs() or ())
    # Where lm-eval leaves a question out it draws one more, so that one is left if the question was among them.
    settings = getattr(task, "fewshot_cfg", None)
    leaves_out = settings is not None and settings.split == task.config.test_split
    return len(task.sampler.df) - int(leaves_out)
