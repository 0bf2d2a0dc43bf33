"""Tasks whose answers are generated, and whole texts, against stock lm-eval on the same model and requests."""

import lm_eval
import pytest
from lm_eval.models.huggingface import HFLM

from fedproxy.data.assets import open_qa
from fedproxy.errors import EvaluationError
from fedproxy.evaluation.harness import check_tasks, evaluate_model
from fedproxy.evaluation.offline_tasks import offline_tasks
from fedproxy.evaluation.prefix_sharing import PrefixSharingLM
from fedproxy.evaluation.quiet import quiet
from fedproxy.evaluation.task_checks import headlines
from fedproxy.evaluation.task_loading import load_task

from .conftest import write_rows
from .test_own_tasks import own  # noqa: F401 (a fixture)

GSM = [{"question": f"What is {a} plus {a}?", "answer": f"{a}+{a}={2 * a}\n#### {2 * a}"} for a in range(1, 5)]
TRIVIA = [
    {"question": "What is blue", "question_id": "1", "answer": {"value": "the sky", "aliases": ["Sky", "the sky"]}},
    {"question": "What is white", "question_id": "2", "answer": {"value": "snow", "aliases": ["snow"]}},
]
DROP = [
    {"query_id": "1", "passage": "Grass is green and the sky is blue.", "question": "What is green?",
     "answers": [["grass"], ["the grass", "green grass"]]},
    {"query_id": "2", "passage": "Two cups are on the table.", "question": "How many cups?", "answers": [["2"]]},
]  # fmt: skip
SQUAD = [{"id": "1", "title": "Sky", "query": "Background: The sky is blue.\nAnswer:", "answers": ["blue", "the blue"]}]


@pytest.fixture
def questions(cache):
    write_rows(cache / "open-qa/gsm8k/test.jsonl", GSM)
    write_rows(cache / "open-qa/triviaqa/validation.jsonl", TRIVIA)
    write_rows(cache / "open-qa/drop/validation.jsonl", [open_qa._drop(row) for row in DROP])
    write_rows(cache / "open-qa/squad/validation.jsonl", SQUAD)
    write_rows(cache / "open-qa/nq_open/validation.jsonl", [{"question": "what is red", "answer": ["tomato"]}])
    mmlu = [{"question": "What is red?", "subject": "x", "choices": ["sky", "a", "b", "tomato"], "answer": 3}] * 5
    write_rows(cache / "exams/mmlu/anatomy/test.jsonl", mmlu[:2])
    write_rows(cache / "exams/mmlu/anatomy/dev.jsonl", mmlu)
    medqa = {"query": "Question: What is red?\n A. sky\n B. snow\nAnswer:", "choices": ["A", "B"], "gold": 1}
    write_rows(cache / "exams/medqa/test.jsonl", [medqa])
    med = {"question": "What is red?", "opa": "sky", "opb": "grass", "opc": "snow", "opd": "blood", "cop": 3}
    write_rows(cache / "exams/medmcqa/validation.jsonl", [med])
    return cache


def stock(model, tokenizer, name, shots=0):
    (task,) = load_task(name, None, ())
    task.prepare(shots, 1234)
    with quiet():
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3)
        return lm_eval.evaluate(lm=lm, task_dict={"tasks": {task.name: task.task}}, bootstrap_iters=0)


@pytest.mark.parametrize("name", ["gsm8k", "triviaqa", "nq_open", "drop", "squad", "mmlu_anatomy", "medqa", "medmcqa"])
def test_scores_are_stock_lm_evals(questions, model, tokenizer, name, monkeypatch):
    monkeypatch.setattr(model.config, "max_position_embeddings", 1024)  # rotary: no weight depends on it
    check_tasks([name])
    ours = evaluate_model(model, tokenizer, [name])
    raw = stock(model, tokenizer, name)
    found = {key: value for key, value in raw["results"][name].items() if isinstance(value, float)}
    assert found
    for key, value in found.items():
        metric, _, kind = key.partition(",")
        if "stderr" not in metric:
            assert ours.scores[name][metric if kind == "none" else f"{metric}:{kind}"] == value
    answers = {(one["doc_id"], one["filter"]): one["filtered_resps"] for one in raw["samples"][name]}
    assert len(answers) >= len(ours.samples)


def test_a_right_answer_scores_under_every_filter(questions, model, tokenizer, monkeypatch):
    monkeypatch.setattr(model.config, "max_position_embeddings", 1024)
    said = iter(["2+2 is\n#### 2", "so 4", "#### 6", "no"])
    monkeypatch.setattr(PrefixSharingLM, "generate_until", lambda self, requests, **_: [next(said) for _ in requests])
    result = evaluate_model(model, tokenizer, ["gsm8k"])
    scores = result.scores["gsm8k"]
    assert (scores["exact_match:strict-match"], scores["exact_match:flexible-extract"]) == (0.5, 0.75)
    assert scores["exact_match"] == 0.5  # the first filter's, whose answers the samples have
    assert [sample["exact_match"] for sample in result.samples] == [1, 0, 1, 0]


def test_drop_keeps_its_answers_through_raw_columns(questions):
    (task,) = load_task("drop", None, ())
    docs = list(task.docs("validation"))
    assert [[tuple(answer) for answer in doc["answers"]] for doc in docs] == [
        [("grass",), ("the grass", "green grass")],
        [("2",)],
    ]


def test_solved_examples_without_a_train_split_are_other_questions(questions, model, tokenizer, monkeypatch):
    monkeypatch.setattr(model.config, "max_position_embeddings", 2048)
    check_tasks(["gsm8k"], num_fewshot=3)
    with pytest.raises(EvaluationError, match=r"num_fewshot 4 is above the 3 examples of gsm8k; lower it"):
        check_tasks(["gsm8k"], num_fewshot=4)
    result = evaluate_model(model, tokenizer, ["gsm8k"], num_fewshot=2)
    assert any("no other rows: its solved examples are scored questions" in note for note in result.notes)
    (task,) = load_task("gsm8k", None, ("test",))
    task.prepare(2, 1234)
    task.task.build_all_requests(limit=None, rank=0, world_size=1)
    for instance in task.task.instances:
        assert instance.args[0].count(f"Question: {instance.doc['question']}") == 1


def test_mmlu_shows_examples_of_its_dev_split(questions, model, tokenizer):
    check_tasks(["mmlu_anatomy"], limit=2, num_fewshot=5)
    assert evaluate_model(model, tokenizer, ["mmlu_anatomy"], num_fewshot=2).scores["mmlu_anatomy"]["n"] == 2
    assert len([name for name in offline_tasks() if name.startswith("mmlu_")]) == 57


def test_what_methods_are_compared_by(questions):
    assert headlines("gsm8k") == {"exact_match"}
    assert headlines("drop") == {"em", "f1"}
    assert headlines("mmlu_anatomy") == {"acc", "answer_nll"}


def test_whole_texts_are_stock_lm_evals(own, model, tokenizer):  # noqa: F811
    path = own(
        output_type="loglikelihood_rolling", doc_to_text="", doc_to_choice=None, training_split=None,
        doc_to_target="The sky is blue in the morning {{a}} and grass is green.",
        metric_list=[{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    )  # fmt: skip
    ours = evaluate_model(model, tokenizer, [path])
    raw = stock(model, tokenizer, path)
    for metric in ("word_perplexity", "bits_per_byte"):
        assert ours.scores["my_sums"][metric] == pytest.approx(raw["results"]["my_sums"][f"{metric},none"], rel=1e-6)
