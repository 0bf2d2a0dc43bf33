import json
import math
import random
import socket

import numpy as np
import pytest
import torch
from lm_eval.tasks import TaskManager

from fedproxy.data.rows import Row
from fedproxy.errors import EvaluationError
from fedproxy.evaluation import hub_tasks, offline_tasks
from fedproxy.evaluation.harness import check_tasks, evaluate_model, task_names
from fedproxy.evaluation.task_rows import render_rows

from .plain_loop import plain_scores


def rows_of(cache, file):
    return [json.loads(line) for line in (cache / "qa" / file).read_text().splitlines()]


def questions_of(cache, file):
    return [
        (
            f"Question: {row['question']}\nAnswer:",
            row["choices"]["text"],
            row["choices"]["label"].index(row["answerKey"]),
        )
        for row in rows_of(cache, file)
    ]


def test_scores_equal_a_plain_loop(cache, model, tokenizer):
    plain = plain_scores(model, tokenizer, questions_of(cache, "arc_easy/test.jsonl"))
    result = evaluate_model(model, tokenizer, ["arc_easy"], batch_tokens=100)
    scores = result.scores["arc_easy"]
    for metric, column in (("acc", 1), ("acc_norm", 2)):
        right = [float(question[column]) for question in plain]
        assert scores[metric] == pytest.approx(np.mean(right))
        assert scores[f"{metric}_stderr"] == pytest.approx(np.std(right, ddof=1) / math.sqrt(len(right)))
    golds = [gold for _, _, gold in questions_of(cache, "arc_easy/test.jsonl")]
    nll = [-values[gold] for (values, *_), gold in zip(plain, golds, strict=True)]
    tokens = [question[3] for question in plain]
    assert scores["answer_nll"] == pytest.approx(sum(nll) / sum(tokens), rel=1e-5)
    assert scores["n"] == 5
    for sample, (values, acc, acc_norm, length), gold in zip(result.samples, plain, golds, strict=True):
        assert sample["loglikelihoods"] == pytest.approx(values, abs=1e-4)
        assert (sample["acc"], sample["acc_norm"], sample["gold"]) == (acc, acc_norm, gold)
        assert sample["answer_tokens"] == length
        assert sample["answer_nll"] == pytest.approx(-values[gold] / length, rel=1e-5)
    assert [sample["doc_id"] for sample in result.samples] == [0, 1, 2, 3, 4]


def test_several_tasks_limit_and_mean(cache, model, tokenizer):
    result = evaluate_model(model, tokenizer, ["arc_easy", "csqa", "boolq"], limit=2)
    assert {name: scores["n"] for name, scores in result.scores.items()} == {"arc_easy": 2, "csqa": 2, "boolq": 2}
    assert [sample["task"] for sample in result.samples] == ["arc_easy"] * 2 + ["csqa"] * 2 + ["boolq"] * 2
    assert "acc_norm" not in result.scores["boolq"]
    assert "acc_norm" not in result.mean  # boolq has none
    assert result.mean["acc"] == pytest.approx(np.mean([scores["acc"] for scores in result.scores.values()]))
    assert result.mean["n"] == 6


def test_solved_examples_come_from_train_by_seed(cache, model, tokenizer):
    results = [
        evaluate_model(model, tokenizer, ["arc_easy"], num_fewshot=2, seed=seed, limit=3).samples for seed in (1, 1, 2)
    ]
    prompts = [[sample["prompt_hash"] for sample in samples] for samples in results]
    assert prompts[0] == prompts[1] != prompts[2]
    zero_shot = evaluate_model(model, tokenizer, ["arc_easy"], limit=3).samples  # settings do not stick to the task
    again = evaluate_model(model, tokenizer, ["arc_easy"], num_fewshot=2, seed=1, limit=3).samples
    assert [sample["prompt_hash"] for sample in zero_shot] != prompts[0] == [sample["prompt_hash"] for sample in again]


def test_split_chooses_the_questions(cache, model, tokenizer):
    validation = evaluate_model(model, tokenizer, ["arc_easy"], split="validation")
    plain = plain_scores(model, tokenizer, questions_of(cache, "arc_easy/validation.jsonl"))
    assert [sample["loglikelihoods"] for sample in validation.samples] == [
        pytest.approx(values, abs=1e-4) for values, *_ in plain
    ]
    assert evaluate_model(model, tokenizer, ["arc_easy"]).scores["arc_easy"]["n"] == 5  # test, as lm-eval has it


def test_results_are_lm_evals_and_name_no_folder_of_this_machine(cache, model, tokenizer):
    result = evaluate_model(model, tokenizer, ["arc_easy"], limit=2, seed=3)
    assert result.lm_eval["versions"] == {"arc_easy": 1.0}
    assert result.lm_eval["n-shot"] == {"arc_easy": 0}
    assert result.lm_eval["results"]["arc_easy"]["acc,none"] == result.scores["arc_easy"]["acc"]
    assert result.lm_eval["configs"]["arc_easy"]["doc_to_text"] == "Question: {{question}}\nAnswer:"
    assert result.lm_eval["config"]["seed"] == 3
    text = json.dumps(result.lm_eval)
    assert str(cache) not in text
    assert "/tmp" not in text


def test_evaluation_leaves_no_trace_and_needs_no_network(cache, model, tokenizer, monkeypatch):
    def refuse(*_):
        raise AssertionError("network used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    model.train()
    before = {name: weights.clone() for name, weights in model.state_dict().items()}
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    evaluate_model(model, tokenizer, ["arc_easy", "boolq"], limit=2, seed=5)
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected
    assert model.training
    assert all(torch.equal(weights, before[name]) for name, weights in model.state_dict().items())


def test_progress_is_told_to_a_function(cache, model, tokenizer):
    seen = []
    evaluate_model(model, tokenizer, ["boolq"], progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (4, 4)


def test_rows_are_what_lm_eval_scores(cache):
    rows = render_rows("arc_easy", "train", limit=2)
    first, second = questions_of(cache, "arc_easy/train.jsonl")[:2]
    assert rows == [
        Row(first[0], f" {first[1][first[2]]}", "arc_easy", "arc_easy/train/0", first[2]),
        Row(second[0], f" {second[1][second[2]]}", "arc_easy", "arc_easy/train/1", second[2]),
    ]


def test_winogrande_rows_put_the_choice_into_the_prompt(cache):
    rows = render_rows("winogrande", "train")
    assert [(row.prompt, row.target, row.label) for row in rows] == [
        ("The cup would not fit in the bed because the bed", " was late.", 1),
        ("The cup would not fit in the bed because the cup", " was late.", 0),
    ]


def test_rows_by_seed_are_a_sample_without_replacement(cache):
    everything = render_rows("csqa")
    drawn = render_rows("csqa", limit=4, seed=1)
    assert len({row.key for row in drawn}) == 4
    assert set(drawn) < set(everything)
    assert drawn == render_rows("csqa", limit=4, seed=1)
    assert drawn != everything[:4]
    assert [row.key for row in everything] == [f"csqa/train/{i}" for i in range(6)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": []}, r"evaluation.tasks is empty; name at least one of arc_challenge, "),
        ({"names": ["arc_easy", "arc_easy"]}, r"names 'arc_easy' twice"),
        ({"names": ["arc_easy"], "limit": 6}, r"evaluation.limit 6 is above the 5 questions of arc_easy"),
        ({"names": ["arc_easy"], "limit": 3, "split": "validation"}, r"limit 3 is above the 2 questions"),
        ({"names": ["arc_easy"], "limit": 0}, r"evaluation.limit must be at least 1"),
        ({"names": ["arc_easy"], "num_fewshot": -1}, r"evaluation.num_fewshot must be at least 0, got -1"),
        ({"names": ["arc_easy"], "num_fewshot": 7}, r"num_fewshot 7 is above the 6 examples of arc_easy"),
        ({"names": ["arc_easy"], "split": "dev"}, r"evaluation.split must be test, validation or null, got 'dev'"),
        ({"names": ["arc_easy"], "metrics": ["acc_nrm"]}, r"unknown metric 'acc_nrm'; did you mean 'acc_norm'\?"),
        ({"names": ["boolq"], "split": "test"}, r"task 'boolq' has no test split; choose one of train, validation"),
        ({"names": ["boolq"], "num_fewshot": 1}, r"'boolq' has no local validation and train data under .*qa; run"),
        ({"names": ["openbookqa"]}, r"'openbookqa' has no local test data under .*fedproxy.assets fetch qa"),
        ({"names": ["socialiqa"]}, r"'socialiqa' has no local validation data"),
    ],
)
def test_settings_that_cannot_be_are_told_in_one_line(cache, arguments, message):
    with pytest.raises(EvaluationError, match=message) as error:
        check_tasks(**arguments)
    assert "\n" not in str(error.value)


@pytest.fixture
def small_index(monkeypatch):
    """One folder of lm-eval's tasks in place of all, whose index takes seconds to build."""
    index = TaskManager(include_path=offline_tasks.lm_eval_folder() / "tasks" / "logiqa", include_defaults=False)
    monkeypatch.setattr(hub_tasks, "hub_manager", lambda: index)


@pytest.mark.usefixtures("small_index")
def test_a_misspelt_task_is_told_with_the_nearest_name(cache):
    with pytest.raises(EvaluationError, match=r"unknown task 'arc_esay'; did you mean 'arc_easy'\?"):
        check_tasks(["arc_esay"])


@pytest.mark.usefixtures("small_index")
def test_a_hub_task_without_hub_is_told_in_one_line(cache):
    with pytest.raises(
        EvaluationError, match=r"'logiqa' has no local data and could not be loaded from the hub"
    ) as error:
        check_tasks(["logiqa"])
    assert "tasks with local data: arc_easy, boolq, " in str(error.value)
    assert "\n" not in str(error.value)


def test_a_broken_file_is_told_with_the_task(cache):
    (cache / "qa" / "arc_easy" / "train.jsonl").write_text('{"question": \n')
    with pytest.raises(EvaluationError, match=r"task 'arc_easy' cannot be read from .*; fetch its data again"):
        render_rows("arc_easy")


def test_good_settings_pass(cache):
    check_tasks(["arc_easy", "winogrande"], limit=2, num_fewshot=1, metrics=["acc", "answer_nll"])


def test_rows_of_an_unknown_split_are_refused(cache):
    with pytest.raises(EvaluationError, match="split must be train, validation or test, got 'dev'"):
        render_rows("arc_easy", "dev")
    with pytest.raises(EvaluationError, match="number of rows must be at least 1, got 0"):
        render_rows("arc_easy", limit=0)


def test_every_task_file_is_named_after_its_task():
    from fedproxy.evaluation.offline_tasks import offline_tasks

    assert {name: task.config["task"] for name, task in offline_tasks().items()} == {
        name: name for name in task_names()
    }
    assert {"arc_easy", "csqa", "commonsense_qa", "social_iqa", "mnli", "tiny_sums"} < set(task_names())
