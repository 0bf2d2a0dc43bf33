"""Chat-formatted evaluation against stock lm-eval on the same model and requests."""

import lm_eval
import pytest
from lm_eval.models.huggingface import HFLM

from fedproxy.errors import EvaluationError
from fedproxy.evaluation.chat import PLAIN, ChatFormat
from fedproxy.evaluation.harness import evaluate_model, prompt_notes
from fedproxy.evaluation.quiet import quiet
from fedproxy.evaluation.task_loading import load_task

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TEMPLATE
FORMATS = [
    (ChatFormat(True), 0),
    (ChatFormat(True, False, "Be brief."), 2),
    (ChatFormat(True, True, "Be brief."), 2),
    (ChatFormat(False, False, "Be brief."), 0),
]


@pytest.fixture
def chatty(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    return tokenizer


def stock(model, tokenizer, name, chat, shots):
    """lm-eval's own model and loop on the same task object."""
    (task,) = load_task(name, None, ("test", "train"))
    task.prepare(shots, 1234)
    with quiet():
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
        raw = lm_eval.evaluate(lm=lm, task_dict={"tasks": {name: task.task}}, bootstrap_iters=0, **chat.options())
    return raw["results"][name], raw["samples"][name]


@pytest.mark.parametrize(("chat", "shots"), FORMATS)
@pytest.mark.parametrize("template", [TEMPLATE, NO_SYSTEM])
def test_scores_are_stock_lm_evals(model, chatty, cache, chat, shots, template, monkeypatch):
    monkeypatch.setattr(chatty, "chat_template", template)
    ours = evaluate_model(model, chatty, ["arc_easy"], num_fewshot=shots, seed=1234, chat=chat)
    results, samples = stock(model, chatty, "arc_easy", chat, shots)
    for metric in ("acc", "acc_norm"):
        assert ours.scores["arc_easy"][metric] == results[f"{metric},none"]
    for mine, theirs in zip(ours.samples, samples, strict=True):
        assert mine["prompt_hash"] == theirs["prompt_hash"]
        likely = [response[0] for response in theirs["filtered_resps"]]
        assert mine["loglikelihoods"] == pytest.approx(likely, abs=1e-4)


def test_the_prompt_is_the_templates(model, chatty, cache):
    (task,) = load_task("arc_easy", None, ("test", "train"))
    chat = ChatFormat(True, False, "Be brief.")
    task.prepare(0, 1234)
    task.task.build_all_requests(limit=1, rank=0, world_size=1, **chat.request_options(chatty))
    assert task.task.instances[0].args[0] == (
        "<s>system: Be brief.</s><s>user: Question: Which of these is red?\nAnswer:</s><s>assistant: "
    )


def test_results_say_how_they_were_asked(model, chatty, cache):
    plain = evaluate_model(model, chatty, ["arc_easy"], limit=2)
    asked = evaluate_model(model, chatty, ["arc_easy"], limit=2, chat=ChatFormat(True))
    assert "apply_chat_template" not in plain.lm_eval["config"]
    assert asked.lm_eval["config"]["apply_chat_template"] is True
    assert [s["prompt_hash"] for s in plain.samples] != [s["prompt_hash"] for s in asked.samples]


def test_no_template_is_one_line(model, tokenizer, cache):
    for ask in (evaluate_model, lambda m, *rest, **more: prompt_notes(m.config, *rest, **more)):
        with pytest.raises(EvaluationError, match=r"apply_chat_template: the tokenizer has no chat template; put one"):
            ask(model, tokenizer, ["arc_easy"], chat=ChatFormat(True))
    assert prompt_notes(model.config, tokenizer, ["arc_easy"], chat=PLAIN) == []


def test_a_broken_template_is_one_line(model, tokenizer, cache, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ nothing.at_all }}")
    with pytest.raises(EvaluationError, match=r"cannot write a question \(.*; correct the template"):
        evaluate_model(model, tokenizer, ["arc_easy"], chat=ChatFormat(True))
