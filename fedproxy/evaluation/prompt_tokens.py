"""lm-eval's tokenisation with tokenizers that it does not expect: those that end every text, and those without ends."""

import copy
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fedproxy.data.tokenisation import encode, encoding, leading_tokens
from fedproxy.errors import EvaluationError


class PromptTokens(HFLM):  # type: ignore[misc]
    """HFLM whose prompts carry no token that the tokenizer puts at a text's end, as rows for tuning carry none.

    For tokenizers that put nothing there, and have a first or an end token, all of this is HFLM's.

    Args:
        pretrained: A causal language model on its device.
        tokenizer: Its tokenizer; it is not changed.
        options: HFLM's other options.
    """

    def __init__(self, pretrained: Any, tokenizer: Any, **options: Any) -> None:
        special = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id)
        if all(token is None for token in special):  # HFLM would add a token that the model does not have
            tokenizer = copy.deepcopy(tokenizer)
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
        super().__init__(pretrained=pretrained, tokenizer=tokenizer, **options)
        self._leading = leading_tokens(tokenizer)
        probe = tokenizer("a", padding=False, truncation=False)["input_ids"]
        ends = list(probe) != encode(["a"], tokenizer, self._leading)[0]
        self._own = ends or (tokenizer.bos_token_id is None and tokenizer.eos_token_id is None)

    @property
    def prefix_token_id(self) -> int:
        """The token that stands in for an empty prompt.

        Raises:
            EvaluationError: If the tokenizer has none.
        """
        token: int | None = super().prefix_token_id
        if token is None:
            raise EvaluationError(
                "the tokenizer has neither a beginning- nor an end-of-sequence token, and a question with an empty "
                "prompt needs one; leave the task out of evaluation.tasks, or give the tokenizer one"
            )
        return token

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **options: Any
    ) -> list[int]:
        """Encode a prompt, or a prompt with its answer."""
        if not self._own or add_special_tokens is not None:
            with encoding():
                found: list[int] = super().tok_encode(string, add_special_tokens, left_truncate_len, **options)
            return found
        ids = encode([string], self.tokenizer, self._leading)[0]
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Encode prompts that the model goes on from, padded to the longest: ids and mask, int64 (batch, longest)."""
        if not self._own:
            with encoding():
                ids, mask = super().tok_batch_encode(strings, padding_side, left_truncate_len, truncation)
            return ids, mask
        rows = [torch.tensor(ids) for ids in encode(strings, self.tokenizer, self._leading)]
        rows = [row[-left_truncate_len:] if left_truncate_len else row for row in rows]
        ones = [torch.ones_like(row) for row in rows]
        pad = self.tokenizer.pad_token_id or 0
        return pad_sequence(rows, True, pad, padding_side), pad_sequence(ones, True, 0, padding_side)
