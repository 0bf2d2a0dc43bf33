"""Tokens and loss masks of every format, beside a plain reference: apply_chat_template and a loop."""

import json
import random
from dataclasses import replace

import pytest

from fedproxy.data.conversations import prompt_and_answer
from fedproxy.data.formats import DataFormat
from fedproxy.data.rows import Row
from fedproxy.data.sources import read_rows
from fedproxy.data.templates import chat_template, unmarked
from fedproxy.data.tokenisation import cut_counts, tokenise
from fedproxy.errors import DataError
from tests.data.chat_templates import BEGINS, CHATML, TEMPLATES, make_tokenizer

ROWS = 200
LIMITS = {"max_input_tokens": 100_000, "max_target_tokens": 100_000}
WORDS = [
    "the",
    "water",
    "in",
    "a glass",
    "is",
    "König",
    "中文",
    "🙂",
    "x = 3\ny",
    "and:",
    "<b>",
    "ring",
    "...",
    " wide ",
    "\tso",
]


def text(rng):
    return " ".join(rng.choices(WORDS, k=rng.randint(1, 7))).strip() + rng.choice(["", ".", " ?", "!\n\nNow"])


def make_messages(rng, family):
    turns = []
    if family != "no_system" and rng.random() < 0.5:
        turns.append({"role": "system", "content": text(rng)})
    for _ in range(rng.randint(1, 4)):
        turns += [{"role": "user", "content": text(rng)}, {"role": "assistant", "content": text(rng)}]
        if family == "tools" and rng.random() < 0.5:
            call = {"type": "function", "function": {"name": "look", "arguments": {"what": text(rng), "n": None}}}
            turns[-1:] = [
                {"role": "assistant", "content": rng.choice(["", "wait"]), "tool_calls": [call]},
                {"role": "tool", "content": text(rng), "name": "look"},
                turns[-1],
            ]
    return turns


def make_tools(rng, family):
    schema = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "default": None}}}
    return [schema] if family == "tools" and rng.random() < 0.5 else None


def reference(tokenizer, messages, tools, *, last=False):
    """Return tokens and labels: what the template adds for an answer, counted in tokens turn by turn."""

    def tokens(turns, asks=False):
        return tokenizer.apply_chat_template(turns, tools=tools, add_generation_prompt=asks, return_dict=False)

    if "{%- generation" in tokenizer.chat_template:
        found = tokenizer.apply_chat_template(
            messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True
        )
        marks = list(found["assistant_masks"])
        if last:
            before = len(tokens(messages[:-1], asks=True))
            marks = [0] * before + marks[before:]
        return found["input_ids"], [id_ if mark else -100 for id_, mark in zip(found["input_ids"], marks, strict=True)]
    ids = tokens(messages)
    labels = [-100] * len(ids)
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    for index in answers[-1:] if last else answers:
        start, end = len(tokens(messages[:index], asks=True)), len(tokens(messages[: index + 1]))
        labels[start:end] = ids[start:end]
    return ids, labels


def labels_of(example):
    inside = {place for start, end in example.spans for place in range(start, end)}
    return [id_ if place in inside else -100 for place, id_ in enumerate(example.input_ids)]


def read(tmp_path, records, form, **options):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return read_rows("mine", str(path), form=DataFormat.by_name(form)(**options))


def check(tmp_path, tokenizer, records, wanted, form, **options):
    examples = tokenise(read(tmp_path, records, form, **options), tokenizer, **LIMITS)
    assert len(examples) == len(records) == len(wanted) == ROWS
    for example, (ids, labels) in zip(examples, wanted, strict=True):
        assert list(example.input_ids) == ids
        assert labels_of(example) == labels


@pytest.mark.parametrize("loss", ["all", "last"])
@pytest.mark.parametrize("family", TEMPLATES)
def test_chat_equals_the_reference(tmp_path, family, loss):
    rng, tokenizer = random.Random(f"{family} {loss}"), make_tokenizer(family)
    records = [{"messages": make_messages(rng, family), "tools": make_tools(rng, family)} for _ in range(ROWS)]
    wanted = [reference(tokenizer, row["messages"], row["tools"], last=loss == "last") for row in records]
    check(tmp_path, tokenizer, records, wanted, "chat", loss=loss)


@pytest.mark.parametrize("family", TEMPLATES)
def test_sharegpt_equals_the_reference(tmp_path, family):
    rng, tokenizer = random.Random(family), make_tokenizer(family)
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    chats = [make_messages(rng, "no_system" if family == "tools" else family) for _ in range(ROWS)]
    records = [
        {"conversations": [{"from": names[turn["role"]], "value": turn["content"]} for turn in turns]}
        for turns in chats
    ]
    check(tmp_path, tokenizer, records, [reference(tokenizer, turns, None) for turns in chats], "chat")


@pytest.mark.parametrize("family", TEMPLATES)
def test_instruction_equals_the_reference(tmp_path, family):
    rng, tokenizer = random.Random(family), make_tokenizer(family)
    records, chats = [], []
    for _ in range(ROWS):
        row = {"instruction": text(rng), "input": rng.choice([None, "", text(rng)]), "output": text(rng)}
        system = text(rng) if family != "no_system" and rng.random() < 0.5 else None
        records.append({**row, "system": system} if system or rng.random() < 0.5 else row)
        asked = f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"]
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]
        chats.append([{"role": "system", "content": system}, *turns] if system else turns)
    check(tmp_path, tokenizer, records, [reference(tokenizer, turns, None) for turns in chats], "instruction")


@pytest.mark.parametrize("family", TEMPLATES)
def test_text_has_every_token_as_a_target_that_another_stands_before(tmp_path, family):
    rng, tokenizer = random.Random(family), make_tokenizer(family)
    records = [{"text": text(rng) + " end"} for _ in range(ROWS)]
    wanted = []
    for row in records:
        ids = list(tokenizer(row["text"])["input_ids"])
        wanted.append((ids, [-100, *ids[1:]]))
        assert (ids[0] == tokenizer.bos_token_id) == (family in BEGINS)
    check(tmp_path, tokenizer, records, wanted, "text")


@pytest.mark.parametrize("family", TEMPLATES)
def test_prompt_and_target_equal_the_reference_in_either_form(tmp_path, family):
    rng, tokenizer = random.Random(family), make_tokenizer(family)
    records = [{"prompt": text(rng), "target": text(rng)} for _ in range(ROWS)]
    chats = [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["target"]}] for row in records
    ]
    check(
        tmp_path, tokenizer, records, [reference(tokenizer, turns, None) for turns in chats], "prompt_target", chat=True
    )
    plain = []
    for row in records:
        head = tokenizer(row["prompt"].rstrip())["input_ids"]
        blank = "" if row["prompt"][-1].isspace() or row["target"][0].isspace() else " "
        whole = list(tokenizer(row["prompt"] + blank + row["target"])["input_ids"])
        plain.append((whole, [-100] * len(head) + whole[len(head) :]))
    check(tmp_path, tokenizer, records, plain, "prompt_target")


@pytest.mark.parametrize("choice", ["chatml", "none"])
@pytest.mark.parametrize("family", ["chatml", "headers"])
def test_built_in_templates_mark_what_comparison_finds_and_render_alike_without_marks(family, choice):
    rng, tokenizer = random.Random(choice), make_tokenizer(family)
    marked = tokenizer.chat_template = chat_template(choice, tokenizer)
    assert "generation" in marked
    assert "generation %}" not in unmarked(marked)
    for number in range(ROWS):
        messages = tuple(make_messages(rng, "tools"))
        row = Row("", "", "s", f"s/train/{number}", messages=messages, loss="all")
        tokenizer.chat_template = marked
        [by_marks] = tokenise([row], tokenizer, **LIMITS)
        tokenizer.chat_template = unmarked(marked)
        [by_comparison] = tokenise([row], tokenizer, **LIMITS)
        assert by_marks.input_ids == by_comparison.input_ids
        # What a template writes behind an answer, up to the next header, counts as the answer's by comparison.
        ends = [(start, end + 1) for start, end in by_marks.spans]
        assert list(by_comparison.spans) == ends
        begins = by_marks.input_ids[0] == tokenizer.bos_token_id
        assert begins == (family in BEGINS)


def test_the_mask_of_several_turns_by_hand():
    tokenizer = make_tokenizer("headers")
    messages = (
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    )
    row = Row("", "", "s", "s/train/0", messages=(*messages, {"role": "assistant", "content": "de"}), loss="all")
    [example] = tokenise([row], tokenizer, **LIMITS)
    words = tokenizer.convert_ids_to_tokens(list(example.input_ids))
    assert words == [
        *("<s>", "<|head|>", "u", "s", "er", "<|/head|>", "ĊĊ", "a", "<|eot|>"),
        *("<|head|>", "a", "s", "s", "i", "s", "t", "an", "t", "<|/head|>", "ĊĊ", "b", "<|eot|>"),
        *("<|head|>", "u", "s", "er", "<|/head|>", "ĊĊ", "c", "<|eot|>"),
        *("<|head|>", "a", "s", "s", "i", "s", "t", "an", "t", "<|/head|>", "ĊĊ", "d", "e", "<|eot|>"),
    ]
    assert example.spans == ((20, 22), (41, 44))
    assert example.target_length == 5


def conversation(*contents, loss="all", ends=False):
    roles = ("user", "assistant")
    messages = tuple({"role": roles[index % 2], "content": said} for index, said in enumerate(contents))
    return Row("", contents[-1], "s", "s/train/7", messages=messages, loss=loss, ends=ends)


def test_a_token_that_the_answer_shares_with_its_cue_is_the_answers():
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    [example] = tokenise([conversation("x", "the")], tokenizer, **LIMITS)
    words = tokenizer.convert_ids_to_tokens(list(example.input_ids))
    [(start, end)] = example.spans
    assert words[start:end] == ["Ġthe", "Ċ"]


def test_a_template_that_rewrites_earlier_turns_is_told_and_can_be_used_for_the_last_answer():
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + (m.content if loop.last or m.role == 'user' else '(cut)') }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    with pytest.raises(
        DataError, match=r"^row s/train/7: the chat template .* writes turns anew .* data.format.loss=last"
    ):
        tokenise([conversation("a", "b", "c", "d")], tokenizer, **LIMITS)
    [example] = tokenise([conversation("a", "b", "c", "d", loss="target")], tokenizer, **LIMITS)
    [(start, end)] = example.spans
    assert tokenizer.decode(list(example.input_ids[start:end])) == "d"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no\nthanks') }}", "cannot render it \\(no thanks\\)|cannot render it \\(no\\)"),
        ("{% for %}", "cannot render it"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "cannot render it"),
        ("{{ messages[0].nothing.at.all }}", "cannot render it"),
        ("{% generation %}{% endgeneration %}{{ messages[0].content }}", "leaves no token of an answer"),
        (None, "there is no chat template to frame it; use data.template=chatml"),
    ],
)
def test_what_a_template_cannot_do_is_one_line_with_the_row(template, message):
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=rf"^row s/train/7[ :].*({message})") as error:
        tokenise([conversation("a", "b")], tokenizer, **LIMITS)
    assert "\n" not in str(error.value)


def test_the_end_token_is_put_behind_an_answer_that_lacks_it():
    tokenizer = make_tokenizer("headers")
    [plain], [ended] = (tokenise([conversation("a", "b", ends=ends)], tokenizer, **LIMITS) for ends in (False, True))
    assert ended.input_ids == (*plain.input_ids, tokenizer.eos_token_id)
    assert ended.target_length == plain.target_length + 1
    own = make_tokenizer("brackets")
    assert len({tokenise([conversation("a", "b", ends=e)], own, **LIMITS)[0].input_ids for e in (False, True)}) == 1


@pytest.mark.parametrize("family", TEMPLATES)
def test_prompt_and_answer_are_the_two_parts_of_the_rendered_text(family):
    tokenizer, rng = make_tokenizer(family), random.Random(family)
    for _ in range(20):
        row = Row("", "", "s", "k", messages=tuple(make_messages(rng, family)))
        prompt, answer = prompt_and_answer(row, tokenizer)
        turns = list(row.messages)
        assert prompt + answer == tokenizer.apply_chat_template(turns, tokenize=False)
        assert prompt == tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
    assert prompt_and_answer(Row("a:", " b", "s", "k"), tokenizer) == ("a:", " b")


def lengths(example):
    return len(example.input_ids), example.target_length


def test_a_long_conversation_keeps_its_beginning_token_and_its_last_answer():
    tokenizer = make_tokenizer("brackets")
    row = conversation("q" * 30, "r" * 10, "s" * 5, "u" * 8)
    [whole] = tokenise([row], tokenizer, **LIMITS)
    assert len(whole.spans) == 2
    [cut] = tokenise([row], tokenizer, max_input_tokens=16, max_target_tokens=10)
    assert len(cut.input_ids) == 26
    assert cut.input_ids[0] == tokenizer.bos_token_id
    assert cut.input_ids[1:] == whole.input_ids[-25:]
    assert labels_of(cut)[1:] == labels_of(whole)[-25:]
    [short] = tokenise([row], tokenizer, max_input_tokens=2, max_target_tokens=4)
    assert (len(short.input_ids), short.prompt_cut, short.target_cut) == (6, True, True)
    assert all(start > 0 for start, _ in short.spans)


@pytest.mark.parametrize("family", ["headers", "chatml"])
def test_long_texts_and_conversations_are_split_into_windows_that_lose_no_target(family):
    tokenizer = make_tokenizer(family)
    said = Row("", "q" * 50, "s", "s/train/0", loss="all")
    [whole] = tokenise([said], tokenizer, **LIMITS)
    windows = tokenise([said], tokenizer, max_input_tokens=5, max_target_tokens=5, long_rows="split")
    lead = int(family == "headers")
    # Behind a leading token there is room for 9 of 50; else a window begins with the last token of the one before.
    assert [len(window.input_ids) for window in windows] == [10] * 5 + [6 if lead else 5]
    assert sum(window.target_length for window in windows) == whole.target_length == (50 if lead else 49)
    kept = [id_ for number, window in enumerate(windows) for id_ in window.input_ids[int(lead or number > 0) :]]
    assert tuple(kept) == whole.input_ids[lead:]
    assert cut_counts([said], windows) == {"cut": 0, "prompts": 0, "targets": 0, "split": 1, "dropped": 0}
    talk = conversation("q" * 30, "r" * 4, "s" * 30, "u" * 4)
    [whole] = tokenise([talk], tokenizer, **LIMITS)
    windows = tokenise([talk], tokenizer, max_input_tokens=5, max_target_tokens=5, long_rows="split")
    assert all(window.target_length and len(window.input_ids) <= 10 for window in windows)
    targets = [id_ for window in windows for id_ in labels_of(window) if id_ != -100]
    assert targets == [id_ for id_ in labels_of(whole) if id_ != -100]


def test_an_answer_of_one_token_is_trained_on_wherever_windows_begin():
    tokenizer = make_tokenizer("chatml")
    for length in range(20):
        row = replace(conversation("q" * (30 + length), "r"), loss="target")
        [whole] = tokenise([row], tokenizer, **LIMITS)
        windows = tokenise([row], tokenizer, max_input_tokens=5, max_target_tokens=5, long_rows="split")
        assert sum(window.target_length for window in windows) == whole.target_length
        assert cut_counts([row], windows) == {"cut": 0, "prompts": 0, "targets": 0, "split": 1, "dropped": 0}


def test_long_rows_are_dropped_and_short_ones_are_not():
    tokenizer = make_tokenizer("chatml")
    rows = [Row("a:", " b", "s", "1"), Row("a" * 9, " b", "s", "2"), Row("", "x" * 12, "s", "3", loss="all")]
    limits = {"max_input_tokens": 6, "max_target_tokens": 4}
    assert [one.key for one in tokenise(rows, tokenizer, **limits, long_rows="drop")] == ["1"]
    assert [lengths(one) for one in tokenise(rows, tokenizer, **limits)][1:] == [(8, 2), (10, 9)]


def test_a_tokenizer_without_offsets_compares_tokens():
    tokenizer = make_tokenizer("headers")
    [wanted] = tokenise([conversation("a", "b", "c", "d")], tokenizer, **LIMITS)
    slow = type("Slow", (type(tokenizer),), {"is_fast": False})
    tokenizer.__class__ = slow
    [found] = tokenise([conversation("a", "b", "c", "d")], tokenizer, **LIMITS)
    assert found == wanted
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}" + (
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with pytest.raises(DataError, match=r"has no offsets to tell them; use a fast tokenizer"):
        tokenise([conversation("x", "the")], tokenizer, **LIMITS)


def test_marks_are_found_whatever_blanks_they_are_written_with():
    tokenizer = make_tokenizer("chatml")
    wanted = tokenise([conversation("a", "b")], tokenizer, **LIMITS)
    tokenizer.chat_template = CHATML.replace("{%- generation %}", "{%-   generation -%}")
    assert tokenise([conversation("a", "b")], tokenizer, **LIMITS) == wanted
