import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fedproxy.data.rows import Row
from fedproxy.data.tokenisation import cut_counts, tokenise
from fedproxy.errors import DataError

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "a", "b", "c", "d", "Ġa", "Ġb", "Ġc", "Ġd", "Ġ", "ab", ":", "Ċ"]


def make_tokenizer(bos: bool):
    """A byte-level tokenizer whose leading space belongs to the word, as in GPT-2 and SmolLM2."""
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    merges = [("Ġ", letter) for letter in "abcd"] + [("a", "b")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def row(prompt, target, key="t/train/0"):
    return Row(prompt, target, "t", key)


def ids(*words):
    return tuple(WORDS.index(word) for word in words)


def one(prompt, target, tokenizer=None, longest=(64, 64)):
    [example] = tokenise(
        [row(prompt, target)],
        tokenizer or make_tokenizer(False),
        max_input_tokens=longest[0],
        max_target_tokens=longest[1],
    )
    return example


def test_prompt_then_target():
    example = one("a b:", " c d")
    assert example.input_ids == ids("a", "Ġb", ":", "Ġc", "Ġd")
    assert (example.spans[0][0], example.target_length, example.key) == (3, 2, "t/train/0")


def test_space_at_the_end_of_the_prompt_moves_to_the_target():
    # Encoded apart, "a: " and "c" would end in the lone token "Ġ" that the model never saw before a word.
    assert one("a: ", "c").input_ids == ids("a", ":", "Ġc")
    assert one("a: ", "c").spans == ((2, 3),)


def test_pair_is_encoded_as_one_text():
    # "a" + "b" is the one token "ab"; the split at one prompt token leaves "ab" out: lm-eval does the same.
    with pytest.raises(DataError, match=r"row t/train/0: its target has no tokens of its own"):
        one("a", "b")


def test_beginning_of_sequence_token_only_where_the_tokenizer_adds_it():
    assert one("a", " b", make_tokenizer(True)).input_ids == ids("<s>", "a", "Ġb")
    assert one("<s>a", " b", make_tokenizer(True)).input_ids == ids("<s>", "a", "Ġb")  # not twice
    assert one("a", " b", make_tokenizer(False)).input_ids == ids("a", "Ġb")


def test_long_prompt_is_cut_from_the_left_and_long_target_from_the_right():
    example = one("a b c d:", " a b c", longest=(2, 2))
    assert example.input_ids == ids("Ġd", ":", "Ġa", "Ġb")
    assert example.spans[0][0] == 2


def test_cut_prompt_keeps_its_first_token():
    example = one("a b c d:", " a", make_tokenizer(True), longest=(3, 9))
    assert example.input_ids == ids("<s>", "Ġd", ":", "Ġa")


def test_empty_prompt_is_conditioned_on_the_first_token():
    example = one("", "a b")
    assert example.input_ids == ids("<s>", "a", "Ġb")
    assert example.spans[0][0] == 1


def test_empty_target_names_the_row():
    with pytest.raises(DataError, match=r"row arc/train/7: its target has no tokens of its own"):
        tokenise([row("a", "", "arc/train/7")], make_tokenizer(False), max_input_tokens=4, max_target_tokens=4)


@pytest.mark.parametrize("bos", [False, True])
def test_same_split_as_lm_eval(bos):
    from lm_eval.models.huggingface import HFLM

    tokenizer = make_tokenizer(bos)
    harness = HFLM.__new__(HFLM)  # only its tokenisation, no model
    harness.tokenizer, harness.backend, harness.add_bos_token = tokenizer, "causal", None
    harness.custom_prefix_token_id = None
    pairs = [("a b:", " c"), ("a b: ", "c"), ("a\n", "b a"), ("<s>a", " d"), ("ab ab  ", " ab")]
    rows = [row(prompt, target) for prompt, target in pairs]
    examples = tokenise(rows, tokenizer, max_input_tokens=99, max_target_tokens=99)
    for example, (prompt, target) in zip(examples, pairs, strict=True):
        context, continuation = harness._encode_pair(prompt, target)
        assert list(example.input_ids) == context + continuation
        assert example.spans[0][0] == len(context)


def with_template(template, **special):
    """The tokenizer above with other special tokens around a text."""
    backend = make_tokenizer(False)._tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 1), ("</s>", 2), ("<unk>", 3)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


ALL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


@pytest.mark.parametrize(
    ("template", "before"),
    [("$A </s>", ()), ("<s> $A </s>", ("<s>",)), ("<s> <unk> $A", ("<s>", "<unk>")), ("$A", ())],
)
def test_special_tokens_stay_in_front_and_none_stands_before_the_target(template, before):
    example = one("a b:", " c", with_template(template, **ALL))
    assert example.input_ids == ids(*before, "a", "Ġb", ":", "Ġc")
    assert example.target_length == 1


def test_a_beginning_that_the_text_has_already_is_not_put_twice():
    assert one("<s>a", " b", with_template("<s> $A </s>", **ALL)).input_ids == ids("<s>", "a", "Ġb")


def test_a_tokenizer_saved_with_cutting_and_padding_cuts_and_pads_nothing():
    tokenizer = make_tokenizer(True)
    tokenizer._tokenizer.enable_truncation(2)
    tokenizer._tokenizer.enable_padding(length=9, pad_id=0, pad_token="<pad>")
    assert one("a b c:", " d", tokenizer).input_ids == ids("<s>", "a", "Ġb", "Ġc", ":", "Ġd")


def ending(prompt, target, tokenizer=None, **limits):
    rows = [Row(prompt, target, "t", "t/train/0", ends=True)]
    limits = {"max_input_tokens": 64, "max_target_tokens": 64} | limits
    return tokenise(rows, tokenizer or make_tokenizer(False), **limits)[0]


def test_a_row_that_ends_gets_the_end_token_once():
    assert ending("a:", " b").input_ids == ids("a", ":", "Ġb", "</s>")
    assert ending("a:", " b").target_length == 2
    assert ending("a:", " b</s>").input_ids == ids("a", ":", "Ġb", "</s>")
    assert ending("a:", " b</s>\n").input_ids == ids("a", ":", "Ġb", "</s>", "Ċ")
    assert ending("", " b", make_tokenizer(True)).input_ids == ids("<s>", "Ġb", "</s>")
    assert ending("a:", " b", with_template("<s> $A </s>", **ALL)).input_ids == ids("<s>", "a", ":", "Ġb", "</s>")
    assert one("a:", " b").input_ids == ids("a", ":", "Ġb")  # a row that does not say so gets none


def test_a_target_that_is_cut_does_not_end_where_it_is_cut():
    example = ending("a:", " b c d", max_target_tokens=2)
    assert example.input_ids == ids("a", ":", "Ġb", "Ġc")
    assert (example.prompt_cut, example.target_cut) == (False, True)


def test_a_tokenizer_without_an_end_token_puts_none():
    assert ending("a:", " b", with_template("$A")).input_ids == ids("a", ":", "Ġb")


@pytest.mark.parametrize(
    ("positions", "expected", "cut"),
    [
        (6, ("<s>", "a", "Ġb", ":", "Ġc", "Ġd"), (False, False)),
        (5, ("<s>", "Ġb", ":", "Ġc", "Ġd"), (True, False)),
        (4, ("<s>", ":", "Ġc", "Ġd"), (True, False)),
        (3, (":", "Ġc", "Ġd"), (True, False)),  # of the prompt its cue is left
        (2, (":", "Ġc"), (True, True)),
    ],
)
def test_a_row_longer_than_the_models_positions_is_cut_and_says_so(positions, expected, cut):
    [example] = tokenise(
        [row("a b:", " c d")], make_tokenizer(True), max_input_tokens=9, max_target_tokens=9, max_tokens=positions
    )
    assert example.input_ids == ids(*expected)
    assert (example.prompt_cut, example.target_cut) == cut
    assert example.target_length >= 1


def test_a_model_with_room_for_no_answer_is_refused():
    with pytest.raises(DataError, match=r"the model has 1 positions, and a prompt and its answer need 2"):
        tokenise([row("a", " b")], make_tokenizer(False), max_input_tokens=9, max_target_tokens=9, max_tokens=1)


def test_cut_rows_are_counted_by_what_they_lost():
    texts = [("a", " b"), ("a b c", " b"), ("a", " b c d"), ("a b c", " b c d")]
    rows = [row(prompt, target, f"t/train/{number}") for number, (prompt, target) in enumerate(texts)]
    examples = tokenise(rows, make_tokenizer(False), max_input_tokens=2, max_target_tokens=2)
    assert cut_counts(rows, examples) == {"cut": 3, "prompts": 2, "targets": 2, "split": 0, "dropped": 0}
