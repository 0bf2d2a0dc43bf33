"""Prompts as tokens: with every kind of tokenizer the tokens that rows for tuning have, and HFLM's own where it can."""

import copy

import pytest
import torch
from lm_eval.api.instance import Instance
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from fedproxy.data.rows import Row
from fedproxy.data.tokenisation import tokenise
from fedproxy.errors import DataError, EvaluationError
from fedproxy.evaluation.prefix_sharing import PrefixSharingLM

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "one", "two", "three", "?"]


def tokenizer(template, **special):
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


ALL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
KINDS = [
    tokenizer("$A </s>", **ALL),
    tokenizer("<s> $A </s>", **ALL),
    tokenizer("<s> $A", **ALL),
    tokenizer("$A", **ALL),
    tokenizer("$A"),
]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=len(WORDS), **sizes)).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_scored_tokens_are_those_of_tuning(model, kind):
    lm = PrefixSharingLM(model, kind)
    (example,) = tokenise([Row("one two ?", " three", "t", "k")], kind, max_input_tokens=9, max_target_tokens=9)
    context, answer = lm._encode_pair("one two ?", " three")
    assert (*context, *answer) == example.input_ids
    assert answer == [WORDS.index("three")]


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_no_ties(model, kind):
    lm = PrefixSharingLM(model, kind)
    asked = [Instance("loglikelihood", {}, ("one two ?", f" {word}"), i) for i, word in enumerate(("one", "three"))]
    (first, _), (second, _) = lm.loglikelihood(asked, disable_tqdm=True)
    assert first != second


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_goes_on_from_a_prompt_that_is_not_over(model, kind):
    lm = PrefixSharingLM(model, kind)
    ids, mask = lm.tok_batch_encode(["one two ?", "two ?"])
    assert ids[:, -1].tolist() == [WORDS.index("?")] * 2
    assert mask[1].tolist() == [0, *[1] * (ids.shape[1] - 1)]
    assert lm.tok_batch_encode(["one two ?"], left_truncate_len=2)[0].tolist() == [[WORDS.index("two"), 7]]


def test_a_tokenizer_is_not_given_a_token_that_the_model_lacks(model):
    bare = tokenizer("$A")
    before = copy.deepcopy(bare.get_vocab())
    lm = PrefixSharingLM(model, bare)
    assert bare.get_vocab() == before
    assert bare.pad_token_id is None
    assert lm.tokenizer.pad_token_id == 0
    with pytest.raises(EvaluationError, match=r"neither a beginning- nor an end-of-sequence token, .*; leave the task"):
        lm.loglikelihood([Instance("loglikelihood", {}, ("", " one"), 0)], disable_tqdm=True)


def test_a_tokenizer_that_fails_at_what_it_does_not_know_is_one_line(model):
    words = {word: index for index, word in enumerate(WORDS)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<other>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    kind = PreTrainedTokenizerFast(tokenizer_object=backend, **ALL)
    lm = PrefixSharingLM(model, PreTrainedTokenizerFast(tokenizer_object=_knowing_a(backend, words), **ALL))
    lm.tokenizer = kind
    with pytest.raises(DataError, match=r"the tokenizer cannot encode a text \(.*put the model's own tokenizer into"):
        lm._encode_pair("one two ?", " four")
    with pytest.raises(DataError, match="the tokenizer cannot encode a text"):
        tokenise([Row("one two ?", " four", "t", "k")], kind, max_input_tokens=9, max_target_tokens=9)


def _knowing_a(backend, words):
    known = Tokenizer(models.WordLevel({**words, "a": len(words)}, unk_token="<unk>"))
    known.pre_tokenizer = backend.pre_tokenizer
    return known
