"""Arguments of tool calls in chat templates: as JSON in each, whichever form it takes them in."""

import json

import pytest

from fedproxy.data.rows import Row
from fedproxy.data.tokenisation import tokenise
from tests.data.chat_templates import make_tokenizer

TEXT = '{"city": "Zürich", "days": 3}'
TEMPLATE = """\
{%- for m in messages %}{{ '<|im_start|>' + m.role + ':' + m.content }}CALLS{{ '<|im_end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant:' }}{% endif %}"""
CALLS = "{%- for c in m.tool_calls or [] %}FORM{%- endfor %}"
FORMS = {
    "as JSON": "{{ c.function.arguments | tojson }}",
    "as a mapping": "{%- if c.function.arguments is mapping %}{{ c.function.arguments | tojson }}{%- endif %}",
    "joined to text": "{{ '' + c.function.arguments + '' }}",
    "printed": "{{ c.function.arguments }}",
}


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_arguments_are_json_in_every_template(form, marked):
    calls = CALLS.replace("FORM", FORMS[form])
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = TEMPLATE.replace(
        "CALLS", "{% generation %}" + calls + "{% endgeneration %}" if marked else calls
    )
    called = {"function": {"name": "weather", "arguments": json.loads(TEXT)}}
    turns = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "", "tool_calls": [called]})
    [example] = tokenise(
        [Row("hi", "", "s", "1", messages=turns)], tokenizer, max_input_tokens=999, max_target_tokens=999
    )
    assert tokenizer.decode(example.input_ids) == f"<|im_start|>user:hi<|im_end|><|im_start|>assistant:{TEXT}<|im_end|>"
    [(start, end)] = example.spans
    assert tokenizer.decode(example.input_ids[start:end]) == (TEXT if marked else f"{TEXT}<|im_end|>")
    assert called["function"]["arguments"] == json.loads(TEXT)  # the row stays as it was
