"""Runs lm-eval without its printing, without its side effects, and with its templates in a sandbox."""

import contextlib
import logging
import random
from collections.abc import Iterator
from typing import Any


class _NoProgress:
    """Stands in for tqdm inside lm-eval: iterates, counts nothing and prints nothing."""

    def __init__(self, iterable: Any = (), *_: Any, **__: Any) -> None:
        self._iterable = iterable

    def __iter__(self) -> Iterator[Any]:
        return iter(self._iterable)

    def update(self, n: int = 1) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep lm-eval and datasets from printing bars and notes, and from advancing Python's random generator."""
    import datasets
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.models.huggingface

    from fedproxy.evaluation.templates import use_sandbox

    use_sandbox()
    modules = (lm_eval.api.task, lm_eval.api.model, lm_eval.models.huggingface)
    logger, bars = logging.getLogger("lm_eval"), datasets.is_progress_bar_enabled()
    state, level, originals = random.getstate(), logger.level, [module.tqdm for module in modules]
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    for module in modules:
        module.tqdm = _NoProgress
    try:
        yield
    finally:
        for module, original in zip(modules, originals, strict=True):
            module.tqdm = original
        if bars:
            datasets.enable_progress_bars()
        logger.setLevel(level)
        random.setstate(state)
