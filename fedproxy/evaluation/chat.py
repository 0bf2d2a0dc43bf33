"""How tasks are asked of a model that was tuned on conversations: through its own chat template."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from fedproxy.errors import EvaluationError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ChatFormat:
    """How a question becomes a prompt; the default is plain text, as most leaderboards have it."""

    apply_chat_template: bool = False
    """Whether a question is a user's turn and its answer the assistant's."""
    fewshot_as_multiturn: bool = False
    """Whether each solved example is a user's and an assistant's turn; else they stand in the one question."""
    system_instruction: str | None = None
    """What the system says first; in plain text it stands in front of the prompt."""

    def options(self) -> dict[str, Any]:
        """Return the arguments of lm-eval's ``evaluate``."""
        return {
            "apply_chat_template": self.apply_chat_template,
            "fewshot_as_multiturn": self.fewshot_as_multiturn,
            "system_instruction": self.system_instruction,
        }

    def request_options(self, tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
        """Return the arguments by which a task of lm-eval writes the same prompts without a model."""
        from lm_eval.models.huggingface import HFLM

        known = SimpleNamespace(tokenizer=tokenizer, chat_template_args={})

        def render(turns: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            found: str = HFLM.apply_chat_template(known, turns, add_generation_prompt)
            return found

        return {**self.options(), "chat_template": render if self.apply_chat_template else None}

    def noted(self) -> dict[str, Any]:
        """Return what a results file says of it: nothing of plain text."""
        return {} if self == ChatFormat() else self.options()

    def check(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Refuse a tokenizer without a template that can write a question.

        Raises:
            EvaluationError: If there is none, or it fails.
        """
        if not self.apply_chat_template:
            return
        if not tokenizer.chat_template:
            raise EvaluationError(
                "evaluation.apply_chat_template: the tokenizer has no chat template; put one beside it "
                "(chat_template.jinja), or leave the key false"
            )
        try:
            self.request_options(tokenizer)["chat_template"]([{"role": "user", "content": "a"}])
        except Exception as error:  # a template raises whatever it likes
            raise EvaluationError(
                f"evaluation.apply_chat_template: the tokenizer's chat template cannot write a question "
                f"({first_line(error)}); correct the template, or leave the key false"
            ) from error


PLAIN = ChatFormat()
"""Questions as plain text."""
