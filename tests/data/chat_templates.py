"""Chat templates in the manner of five model families, written for the tests, and a tokenizer that knows their marks.

They differ in what matters to masks: marked answers or none, a system role, a system text inside the first user turn or
none at all, a beginning token, trimmed texts, tools.
"""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}
{%- else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

HEADERS = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|head|>' + message['role'] + '<|/head|>\n\n' + message['content'] | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}"""

NO_SYSTEM = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{- '<turn>' + role + '\n' + message['content'] | trim + '</turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"""

BRACKETS = """\
{%- set system = messages[0]['content'] + '\n\n' if messages[0]['role'] == 'system' else '' %}
{%- set turns = messages[1:] if system else messages %}
{{- bos_token }}
{%- for message in turns %}
{%- if message['role'] == 'user' %}{{ '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}
{%- else %}{{ ' ' + message['content'] + eos_token }}{% endif %}
{%- endfor %}"""

TOOLS = """\
{%- if tools %}{{ '<|system|>\nTools: ' + tools | tojson + eos_token + '\n' }}{% endif %}
{%- for message in messages %}
{{- '<|' + message['role'] + '|>\n' + message['content'] }}
{%- for call in message.get('tool_calls', []) %}{{ '<call>' + call['function'] | tojson + '</call>' }}{% endfor %}
{{- eos_token + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""

TEMPLATES = {"chatml": CHATML, "headers": HEADERS, "no_system": NO_SYSTEM, "brackets": BRACKETS, "tools": TOOLS}
BEGINS = ("headers", "no_system", "brackets")
"""Families whose tokenizers put a beginning token in front of a text."""
_MARKS = (
    *("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|head|>", "<|/head|>", "<|eot|>", "<turn>", "</turn>"),
    *("[INST]", "[/INST]", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<call>", "</call>"),
)
_PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""Line ends stay together, as in the tokenizers of Llama 3 and its like: a template's last ones are one token there."""
_PAIRS = ("Ġt", "he", "in", "Ġa", "er", "Ġw", "an", "re", "on", "Ċ Ċ", "Ġt he", "in g", ": Ġ")


def make_tokenizer(family: str, **special: str) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with a few merges, among them some over line ends and blanks."""
    merges = [tuple(pair.split()) if " " in pair else tuple(pair) for pair in _PAIRS]
    words = [*_MARKS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *dict.fromkeys("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    if family in BEGINS:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in _MARKS])
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"} | special
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    made.chat_template = TEMPLATES.get(family)
    return made
