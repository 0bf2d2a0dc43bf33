"""Chat templates: which one a run's conversations are framed by, and whether it may go to clients.

A template is Jinja text. transformers renders it in a sandbox without access to files, modules or attributes.
"""

import re

from transformers import PreTrainedTokenizerBase

from fedproxy.data.encoding import leading_tokens
from fedproxy.errors import ConfigError, one_line
from fedproxy.files import at_home, read_whole

MOST_BYTES = 1 << 18
"""Largest template: 256 KiB; the longest ones in use have a tenth of it."""

CHATML = """\
{%- if tools %}{{ '<|im_start|>system\\nTools:\\n' + tools | tojson + '<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}
{%- generation %}{{ message.content }}
{%- if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}
{{- eos_token or '<|im_end|>' }}{% endgeneration %}
{{- '\\n' }}
{%- else %}{{ message.content + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
"""Every turn between <|im_start|> and <|im_end|>, its role on the first line.

Choice: an answer ends with the tokenizer's own end token, at which generation stops; in chatml's tokenizers it is
<|im_end|>.
"""

PLAIN = """\
{%- if tools %}{{ 'Tools: ' + tools | tojson + '\\n' }}{% endif %}
{%- for message in messages %}
{{- message.role | capitalize + ':' }}
{%- if message.role == 'assistant' %}
{%- generation %}{{ ' ' + message.content }}
{%- if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}{{ eos_token }}{% endgeneration %}
{{- '\\n' }}
{%- else %}{{ ' ' + message.content + '\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""
"""``User: ...`` and ``Assistant: ...`` in lines of plain text, the end token behind every answer."""

_MARK = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
_TEXTS = {"chatml": CHATML, "none": PLAIN}
BUILT_IN = ("auto", *_TEXTS)
"""Choices that are no files."""


def chat_template(choice: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the template that a recipe asks for.

    Args:
        choice: ``auto`` (the tokenizer's own, else plain lines), ``chatml``, ``none`` (plain lines) or a file.
        tokenizer: The target's tokenizer.

    Raises:
        ConfigError: If a file cannot be read, is too long or not UTF-8, or the tokenizer has several templates of which
            none is the default.
    """
    own = tokenizer.chat_template
    if choice == "auto" and isinstance(own, dict):
        if "default" not in own:
            names = one_line(", ".join(sorted(own)), 80)
            raise ConfigError(
                f"data.template=auto: the target has several chat templates ({names}) and none is the default; put one "
                "into a file and use data.template=FILE"
            )
        own = own["default"]
    if choice == "auto" and own:
        return _bounded(str(own), "the target's chat template", "use data.template=chatml")
    if choice in BUILT_IN:
        begin = "{{- bos_token }}" if tokenizer.bos_token_id in leading_tokens(tokenizer) else ""
        return begin + _TEXTS.get(choice, PLAIN)
    try:
        text = read_whole(at_home(choice), most=MOST_BYTES).decode("utf-8-sig")
    except (OSError, ValueError) as error:  # a zero byte, not UTF-8
        reason = getattr(error, "strerror", None) or one_line(error, 80)
        raise ConfigError(
            f"data.template={one_line(choice)} cannot be read as a chat template ({reason}); give a file of Jinja "
            "text, or auto, chatml or none"
        ) from error
    return _bounded(text, f"data.template={one_line(choice)}", "give another file")


def unmarked(template: str | None) -> str | None:
    """Return a template that renders alike without ``{% generation %}``, a tag that other programs do not know."""
    if template is None:
        return None
    return _MARK.sub(lambda mark: f"{{%{mark[1]} {'endif' if mark[2] else 'if true'} {mark[3]}%}}", template)


def _bounded(text: str, what: str, way_out: str) -> str:
    if not text.strip():
        raise ConfigError(f"{what} is empty; {way_out}")
    if len(text.encode("utf-8", "surrogatepass")) > MOST_BYTES:
        raise ConfigError(f"{what} has more than {MOST_BYTES} bytes; {way_out}")
    return text
