import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fedproxy.data.rows import Row
from fedproxy.data.tokenisation import tokenise
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
    assert (example.prompt_length, example.target_length, example.key) == (3, 2, "t/train/0")


def test_space_at_the_end_of_the_prompt_moves_to_the_target():
    # Encoded apart, "a: " and "c" would end in the lone token "Ġ" that the model never saw before a word.
    assert one("a: ", "c").input_ids == ids("a", ":", "Ġc")
    assert one("a: ", "c").prompt_length == 2


def test_pair_is_encoded_as_one_text():
    # "a" + "b" is the one token "ab"; the split at one prompt token leaves "ab" out: lm-eval does the same.
    with pytest.raises(DataError, match=r"row t/train/0: the target 'b' has no tokens"):
        one("a", "b")


def test_beginning_of_sequence_token_only_where_the_tokenizer_adds_it():
    assert one("a", " b", make_tokenizer(True)).input_ids == ids("<s>", "a", "Ġb")
    assert one("<s>a", " b", make_tokenizer(True)).input_ids == ids("<s>", "a", "Ġb")  # not twice
    assert one("a", " b", make_tokenizer(False)).input_ids == ids("a", "Ġb")


def test_long_prompt_is_cut_from_the_left_and_long_target_from_the_right():
    example = one("a b c d:", " a b c", longest=(2, 2))
    assert example.input_ids == ids("Ġd", ":", "Ġa", "Ġb")
    assert example.prompt_length == 2


def test_cut_prompt_keeps_its_first_token():
    example = one("a b c d:", " a", make_tokenizer(True), longest=(3, 9))
    assert example.input_ids == ids("<s>", "Ġd", ":", "Ġa")


def test_empty_prompt_is_conditioned_on_the_first_token():
    example = one("", "a b")
    assert example.input_ids == ids("<s>", "a", "Ġb")
    assert example.prompt_length == 1


def test_empty_target_names_the_row():
    with pytest.raises(DataError, match=r"row arc/train/7: the target '' has no tokens"):
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
        assert example.prompt_length == len(context)
