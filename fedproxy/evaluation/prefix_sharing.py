"""lm-eval's Hugging Face model."""

from collections.abc import Callable
from typing import Any

from lm_eval.models.huggingface import HFLM


class PrefixSharingLM(HFLM):  # type: ignore[misc]
    """HFLM that remembers how many tokens each continuation has."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        batch_size: int,
        batch_tokens: int,
        on_progress: Callable[[int, int], None] | None,
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self.answer_tokens: dict[tuple[str, str], int] = {}
        self.sharing = False

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> Any:
        self.answer_tokens |= {text: len(continuation) for text, _, continuation in requests if text is not None}
        return super()._loglikelihood_tokens(requests, **kwargs)
