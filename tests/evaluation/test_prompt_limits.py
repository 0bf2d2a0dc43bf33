"""What does not fit into a model's positions is known before any work, and counted."""

import pytest

from fedproxy.errors import EvaluationError
from fedproxy.evaluation.harness import evaluate_model, prompt_notes
from fedproxy.evaluation.prompt_limits import positions

from .conftest import ARC, write_rows
from .test_own_tasks import own  # noqa: F401 (a fixture)

GENERATE = {
    "output_type": "generate_until",
    "doc_to_choice": None,
    "doc_to_target": "{{a}}",
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    "generation_kwargs": {"until": ["\n"], "do_sample": False},
}


def both_notes(model, tokenizer, tasks, **settings):
    """Return what is said before a model is loaded, which must be what its evaluation says."""
    before = prompt_notes(model.config, tokenizer, tasks, **settings)
    assert evaluate_model(model, tokenizer, tasks, **settings).notes == before
    return before


def test_prompts_that_fit_are_not_mentioned(cache, model, tokenizer):
    assert positions(model.config, tokenizer) == 256
    assert both_notes(model, tokenizer, ["arc_easy", "boolq"]) == []


def test_prompts_that_are_cut_are_counted(cache, model, tokenizer):
    model.config.max_position_embeddings = 25
    assert both_notes(model, tokenizer, ["arc_easy"], num_fewshot=2, seed=1) == [
        "arc_easy: 5 of 5 prompts are longer than 25 positions allow and lose their beginning; lower num_fewshot."
    ]
    longest = []  # of context and answer, whose last token is never read
    for question, answers, _ in ARC[:5]:
        whole = [len(tokenizer(f"Question: {question}\nAnswer: {answer}")["input_ids"]) for answer in answers]
        longest.append(max(whole) - 1)
    (note,) = both_notes(model, tokenizer, ["arc_easy"])
    assert note == (
        f"arc_easy: {sum(length > 25 for length in longest)} of 5 prompts are longer than 25 positions allow and lose "
        "their beginning; use a model with more positions."
    )


def test_one_token_decides(own, cache, model, tokenizer):  # noqa: F811
    row = {"q": "the sky is", "c": ["blue in the morning", "green"], "a": "green"}
    write_rows(cache / "mine" / "test.jsonl", [row])
    whole = len(tokenizer("the sky is blue in the morning")["input_ids"])
    for most, cut in ((whole - 1, 0), (whole - 2, 1)):  # the last token of an answer is not read
        model.config.max_position_embeddings = most
        assert len(both_notes(model, tokenizer, [own()])) == cut


def test_an_answer_longer_than_the_positions_or_empty_is_refused(own, cache, model, tokenizer):  # noqa: F811
    write_rows(cache / "mine" / "test.jsonl", [{"q": "x", "c": ["green"], "a": "green"}] * 2)
    write_rows(cache / "mine" / "train.jsonl", [{"q": "x", "c": ["green"], "a": "green"}])
    model.config.max_position_embeddings = 1
    message = r"an answer of question 0 has \d+ tokens, the model has 1 positions"
    with pytest.raises(EvaluationError, match=message):
        prompt_notes(model.config, tokenizer, [own()])
    rows = [{"q": "x", "c": ["green"], "a": "green"}, {"q": "x", "c": ["green", ""], "a": "green"}]
    write_rows(cache / "mine" / "test.jsonl", rows)
    path = own(target_delimiter="")
    with pytest.raises(EvaluationError, match="question 1 has an empty answer"):
        prompt_notes(model.config, tokenizer, [path])


def test_a_generated_answer_gets_what_the_prompts_leave(own, model, tokenizer):  # noqa: F811
    path = own(**GENERATE)
    prompt = max(len(tokenizer(f"{k} + 1 =")["input_ids"]) for k in range(2, 6))
    (note,) = both_notes(model, tokenizer, [path])  # 256 tokens, which lm-eval asks for, of 256 positions
    assert note == f"my_sums: an answer has at most {256 - prompt} tokens, what 256 positions leave the prompts."
    result = evaluate_model(model, tokenizer, [path])
    assert "exact_match" in result.scores["my_sums"]
    assert result.lm_eval["configs"]["my_sums"]["generation_kwargs"]["max_gen_toks"] == 256 - prompt
    model.config.max_position_embeddings = 1024
    assert both_notes(model, tokenizer, [path]) == []  # and nothing of it stays with the task


def test_prompts_of_a_generative_task_are_counted_too(own, model, tokenizer):  # noqa: F811
    path = own(**GENERATE | {"generation_kwargs": {"until": ["\n"], "max_gen_toks": 250}})
    (note,) = both_notes(model, tokenizer, [path], num_fewshot=2)
    assert note.startswith("my_sums: 4 of 4 prompts are longer than 256 positions allow")


def test_a_generative_task_without_any_room_is_refused(own, model, tokenizer):  # noqa: F811
    model.config.max_position_embeddings = 4
    message = r"'my_sums' generates up to 256 tokens after prompts of up to \d+, the model has 4 positions; lower num"
    with pytest.raises(EvaluationError, match=message):
        prompt_notes(model.config, tokenizer, [own(**GENERATE)], num_fewshot=2)


def test_a_model_that_cannot_share_says_why(cache, tokenizer):
    import torch
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    mamba = MambaForCausalLM(
        MambaConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, state_size=8)
    ).eval()
    (note,) = evaluate_model(mamba, tokenizer, ["arc_easy"]).notes
    assert note.startswith("Every sequence is run alone, as lm-eval does it: ")
