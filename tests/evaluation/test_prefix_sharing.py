"""Every answer of PrefixSharingLM is compared with stock HFLM's on the same model and requests."""

import re

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoConfig, AutoModelForCausalLM

from fedproxy.evaluation.prefix_sharing import PrefixSharingLM, most_telling
from fedproxy.evaluation.token_trees import Query, batches, plant, score

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "initializer_range": 0.3}
BLOCKS = {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 256}
FAMILIES = {
    "llama": BLOCKS,
    "qwen2": BLOCKS,
    "mistral": {**BLOCKS, "sliding_window": None},
    "gemma": {**BLOCKS, "head_dim": 8},
    "gemma2": {**BLOCKS, "head_dim": 8, "final_logit_softcapping": 5.0, "sliding_window": 128},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256, "initializer_range": 0.3},
    "opt": {**SMALL, "ffn_dim": 64, "max_position_embeddings": 256, "init_std": 0.3, "word_embed_proj_dim": 32},
    "gpt_neox": {**SMALL, "intermediate_size": 64, "max_position_embeddings": 256},
}
UNSHARED = {  # a bias by distance that ignores position ids; a recurrent state
    "bloom": {"hidden_size": 32, "n_layer": 3, "n_head": 4, "initializer_range": 0.3},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 3, "state_size": 8, "initializer_range": 0.3},
}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 16}
MLA = {"kv_lora_rank": 8, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 16}
GIVEN_AWAY = {  # what a tree's mask and position ids cannot say, under names that no list of ours has
    "gpt_neo": {  # a local window
        "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 16, "initializer_range": 0.3,
        "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 256,
    },
    "doge": {**BLOCKS, "keep_window_size": 16},  # the number of tokens that a head keeps
    "deepseek_v32": {  # a choice among all tokens of a row
        **BLOCKS, **MLA, **ROUTED, "num_key_value_heads": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
        "index_topk": 16, "index_n_heads": 2, "index_head_dim": 16,
    },
    "bamba": {**BLOCKS, **MAMBA2, "attn_layer_indices": [1]},  # recurrent layers beside attention
    "falcon_h1": {**BLOCKS, **MAMBA2, "mamba_d_ssm": 64},  # and inside one block
    "lfm2": {**BLOCKS, "full_attn_idxs": [1], "block_multiple_of": 8},  # short convolutions
}  # fmt: skip
EXACT = {  # windows, chunks and sinks that are known, and experts
    "gpt_oss": {**BLOCKS, "head_dim": 8, "sliding_window": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma3_text": {**BLOCKS, "head_dim": 8, "sliding_window": 16},
    "llama4_text": {
        **BLOCKS, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 4, "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2, "attention_chunk_size": 16,
    },
    "mixtral": {**BLOCKS, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
}  # fmt: skip
CONTEXT = "Question: Where would you put a cup?\nAnswer:"
REQUESTS = [
    *[(CONTEXT, f" {choice}") for choice in ("in the oven", "under the bed", "on the table", "on the table.")],
    *[(CONTEXT, choice) for choice in (" a", " b")],  # one token each
    ("Question: Where would you put a cup of snow?\nAnswer:", " in the oven"),
    ("The cup was on the table because the cup", " is white."),
    ("The cup was on the table because the table", " is white."),  # the context depends on the choice
    ("", "snow is white"),
    ("", "<s> snow"),  # a continuation that begins with the prefix token
    ("grass is ", "green"),  # the trailing space belongs to the continuation
    ("gre", "en"),  # the boundary lies inside a token
    ("the sky is blue in the morning " * 8, "and the grass is green"),
    (CONTEXT, " in the oven"),  # asked twice
]


def build(family, options, tokenizer, **more):
    torch.manual_seed(1)
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **{**options, **more})
    return AutoModelForCausalLM.from_config(config).eval()


def instances(requests, kind="loglikelihood"):
    return [Instance(request_type=kind, doc={}, arguments=arguments, idx=0) for arguments in requests]


def both(model, tokenizer, requests=REQUESTS, **options):
    ours = PrefixSharingLM(model, tokenizer, batch_size=4, batch_tokens=200, **options)
    stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, **options)
    asked = instances(requests)
    return ours, ours.loglikelihood(asked, disable_tqdm=True), stock.loglikelihood(asked, disable_tqdm=True)


def assert_equal(found, expected):
    for (value, greedy), (wanted, wanted_greedy) in zip(found, expected, strict=True):
        assert value == pytest.approx(wanted, abs=1e-3)
        assert greedy == wanted_greedy


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_equal_stock_hflm(family, tokenizer):
    ours, found, expected = both(build(family, FAMILIES[family], tokenizer), tokenizer)
    assert ours.sharing, ours.obstacle
    assert_equal(found, expected)
    assert abs(found[2][0] - found[3][0]) > 0.1  # the model tells answers apart


@pytest.mark.parametrize("family", UNSHARED)
def test_a_model_that_cannot_share_falls_back(family, tokenizer):
    ours, found, expected = both(build(family, UNSHARED[family], tokenizer), tokenizer)
    assert not ours.sharing
    assert_equal(found, expected)


@pytest.mark.parametrize("family", GIVEN_AWAY)
def test_a_model_that_gives_itself_away_falls_back_and_says_by_how_much(family, tokenizer):
    ours, found, expected = both(build(family, GIVEN_AWAY[family], tokenizer), tokenizer)
    assert_equal(found, expected)
    assert re.fullmatch(r"over shared prefixes log-likelihoods are \S+ nats from a plain forward's", ours.obstacle)


@pytest.mark.parametrize("family", EXACT)
def test_windows_chunks_and_experts_that_are_known_share(family, tokenizer):
    ours, found, expected = both(build(family, EXACT[family], tokenizer), tokenizer)
    assert ours.sharing, ours.obstacle
    assert_equal(found, expected)


def test_what_is_compared_is_the_longest_the_most_crowded_and_the_shortest():
    queries = [Query([1, 2, 3, 4, 5, 6], [7]), Query([1, 2, 8], [9]), Query([1, 2, 9, 9], [9]), Query([4], [5])]
    forwards = batches(plant(queries, hidden_size=32, max_nodes=100), batch_tokens=100, max_scored=10, overhead=1000)
    # Rows are sorted by tokens, so that 1 2 9 9 comes after the five other nodes of 1 2 3 4 5 6 and 1 2 8.
    assert len(forwards) == 1
    assert most_telling(forwards, queries) == {0, 2, 3}


def test_checked_batches_come_first_and_change_no_answer(tokenizer):
    model = build("llama", FAMILIES["llama"], tokenizer)
    ours = PrefixSharingLM(model, tokenizer, batch_tokens=60)
    asked = [pair for pair in REQUESTS if pair[0]]
    found = ours.loglikelihood(instances(asked), disable_tqdm=True)
    queries = list(ours._queries([(pair, *ours._encode_pair(*pair)) for pair in asked]).values())
    unchecked = {}
    for batch in batches(plant(queries, 32, 60), 60, 2**26 // len(tokenizer), 40):
        unchecked |= score(model, batch, queries)
    assert found == [unchecked[index] for index in range(len(asked))]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_kernels_agree(implementation, tokenizer):
    model = build("llama", FAMILIES["llama"], tokenizer)
    model.set_attn_implementation(implementation)
    ours, found, expected = both(model, tokenizer)
    assert ours.sharing, ours.obstacle
    assert_equal(found, expected)


def test_long_contexts_are_cut_from_the_left_like_hflm_cuts_them(tokenizer):
    ours, found, expected = both(build("llama", FAMILIES["llama"], tokenizer), tokenizer, max_length=12)
    assert ours.sharing
    assert_equal(found, expected)


@pytest.mark.parametrize(("family", "window"), [("mistral", 16), ("gemma2", 16), ("mistral", 200)])
def test_sequences_beyond_a_sliding_window_go_through_hflm(family, window, tokenizer):
    model = build(family, FAMILIES[family], tokenizer, sliding_window=window)
    ours, found, expected = both(model, tokenizer)
    encoded = [(None, *ours._encode_pair(context, answer)) for context, answer in REQUESTS if context]
    longest = [len(context) + len(answer) - 1 for _, context, answer in encoded]
    assert set(ours._queries(encoded)) == {i for i, length in enumerate(longest) if length <= window}
    assert ours._queries(encoded)
    assert_equal(found, expected)


def test_the_window_matters_to_this_model(tokenizer):
    # Guards the test above: with the window ignored, the long request would get another value.
    narrow = build("mistral", FAMILIES["mistral"], tokenizer, sliding_window=16)
    wide = build("mistral", FAMILIES["mistral"], tokenizer, sliding_window=None)
    wide.load_state_dict(narrow.state_dict())
    values = [both(model, tokenizer, REQUESTS[13:14])[1][0][0] for model in (narrow, wide)]
    assert abs(values[0] - values[1]) > 0.01


def test_bfloat16_answers_stay_within_its_precision(tokenizer):
    model = build("llama", {**FAMILIES["llama"], "initializer_range": 0.1}, tokenizer).to(torch.bfloat16)
    ours, found, expected = both(model, tokenizer)
    assert ours.sharing, ours.obstacle
    for (value, _), (wanted, _) in zip(found, expected, strict=True):
        assert value == pytest.approx(wanted, rel=0.02)


def test_under_autocast_the_head_keeps_its_dtype(tokenizer):
    model = build("llama", {**FAMILIES["llama"], "initializer_range": 0.1}, tokenizer)
    head, dtypes = model.get_output_embeddings(), []
    head.register_forward_hook(lambda _, inputs, output: dtypes.append(output.dtype))
    _, exact, _ = both(model, tokenizer)
    dtypes.clear()
    ours = PrefixSharingLM(model, tokenizer, autocast=torch.bfloat16)
    found = ours.loglikelihood(instances(REQUESTS), disable_tqdm=True)
    assert set(dtypes) == {torch.float32}
    assert "forward" not in vars(head)
    differences = [abs(value - wanted) for (value, _), (wanted, _) in zip(found, exact, strict=True)]
    assert 0 < max(differences) < 0.05 * max(abs(value) for value, _ in exact)


def count_tokens(model):
    """Record the number of tokens of every forward."""
    counts = []

    def note(_, inputs, kwargs):
        tokens = kwargs["input_ids"] if "input_ids" in kwargs else inputs[0]
        counts.append(tokens.numel())

    model.register_forward_pre_hook(note, with_kwargs=True)
    return counts


def test_every_prefix_is_run_once(tokenizer):
    model = build("llama", FAMILIES["llama"], tokenizer)
    examples = "Question: What is blue?\nAnswer: the sky\n\n" * 3  # solved examples that the sampler repeats
    questions = ["Question: What is green?\nAnswer:", "Question: Which of these is red?\nAnswer:"]
    requests = [(examples + question, f" {choice}") for question in questions for choice in ("grass", "snow", "a cup")]
    ours = PrefixSharingLM(model, tokenizer, batch_tokens=2000)
    encoded = [ours._encode_pair(*pair) for pair in requests]
    sequences = [(context + answer)[:-1] for context, answer in encoded]
    prefixes = {tuple(tokens[:end]) for tokens in sequences for end in range(1, len(tokens) + 1)}
    counts = count_tokens(model)
    ours.loglikelihood(instances(requests), disable_tqdm=True)
    assert counts[0] == len(prefixes)
    assert len(counts) <= 4  # and at most three sequences alone, to see that sharing is right
    assert set(counts[1:]) <= set(map(len, sequences))
    assert 3 * len(prefixes) < sum(map(len, sequences))


def test_other_request_types_are_hflms(tokenizer):
    model = build("llama", FAMILIES["llama"], tokenizer)
    ours = PrefixSharingLM(model, tokenizer, batch_size=2)
    stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
    rolling = instances([("the sky is blue",), ("snow is white " * 40,)], "loglikelihood_rolling")
    assert ours.loglikelihood_rolling(rolling, disable_tqdm=True) == stock.loglikelihood_rolling(
        rolling, disable_tqdm=True
    )


PROMPTS = ["the sky", CONTEXT, "snow is", "Question: What is green?\nAnswer:", "a cup"]
SETTINGS = {
    "greedy": {"until": ["."], "max_gen_toks": 5, "do_sample": False},
    "long": {"until": ["e", " s"], "max_gen_toks": 24},
    "text": {"until": "a", "max_new_tokens": 9, "temperature": 0.0},
    "endless": {"until": [], "max_gen_toks": 12, "do_sample": False},
}


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_generated_answers_are_hflms_whatever_ends_them(tokenizer, family, monkeypatch):
    """Requests of all settings at once; slots are used where the family suits them, with no word to HFLM."""
    model = build(family, FAMILIES[family], tokenizer)
    ours = PrefixSharingLM(model, tokenizer, batch_size=2)
    stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
    asked = instances([(text, options) for text in PROMPTS for options in SETTINGS.values()], "generate_until")
    wanted = stock.generate_until(asked, disable_tqdm=True)
    monkeypatch.setattr(HFLM, "generate_until", None)
    assert ours.generate_until(asked, disable_tqdm=True) == wanted
    assert len(set(map(len, wanted))) > 3


@pytest.mark.parametrize(
    "more", [{"do_sample": True, "temperature": 1.0}, {"repetition_penalty": 1.5}, {"num_beams": 2}]
)
def test_what_is_not_greedy_search_is_left_to_hflm(tokenizer, more):
    model = build("llama", FAMILIES["llama"], tokenizer)
    ours = PrefixSharingLM(model, tokenizer, batch_size=2)
    stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
    asked = instances([(text, {"until": ["."], "max_gen_toks": 5, **more}) for text in PROMPTS], "generate_until")
    texts = []
    for side in (ours, stock):
        torch.manual_seed(0)
        texts.append(side.generate_until(asked, disable_tqdm=True))
    assert texts[0] == texts[1]


def test_a_models_own_settings_for_generation_count(tokenizer):
    model = build("llama", FAMILIES["llama"], tokenizer)
    asked = instances([(text, SETTINGS["long"]) for text in PROMPTS], "generate_until")
    ours = PrefixSharingLM(model, tokenizer, batch_size=2)
    plain = ours.generate_until(asked, disable_tqdm=True)
    model.generation_config.repetition_penalty = 3.0
    stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
    wanted = stock.generate_until(asked, disable_tqdm=True)
    assert ours.generate_until(asked, disable_tqdm=True) == wanted
    assert wanted != plain


def test_progress_ends_at_the_number_of_requests(tokenizer):
    model = build("llama", FAMILIES["llama"], tokenizer)
    seen = []
    ours = PrefixSharingLM(
        model, tokenizer, batch_tokens=50, on_progress=lambda done, total: seen.append((done, total))
    )
    ours.loglikelihood(instances(REQUESTS), disable_tqdm=True)
    assert len(seen) > 3
    assert seen == sorted(seen)
    assert seen[-1] == (len(REQUESTS), len(REQUESTS))


def test_a_peft_model_shares_prefixes(tokenizer):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build("llama", FAMILIES["llama"], tokenizer), LoraConfig(target_modules=["q_proj"]))
    for name, weights in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weights)
    ours, found, expected = both(model.eval(), tokenizer)
    assert ours.sharing, ours.obstacle
    assert_equal(found, expected)
