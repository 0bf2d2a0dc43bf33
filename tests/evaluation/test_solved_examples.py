"""Solved examples come from the train split, and never hold the question that is asked."""

import pytest

from fedproxy.errors import EvaluationError
from fedproxy.evaluation.harness import check_tasks, evaluate_model
from fedproxy.evaluation.loaded_task import LoadedTask
from fedproxy.evaluation.task_loading import load_task

from .conftest import write_rows
from .test_own_tasks import TASK, own  # noqa: F401 (a fixture)

ROWS = {
    split: [{"q": f"{split}{k}", "c": ["yes", "no"], "a": "yes"} for k in range(8)]
    for split in ("train", "validation", "test")
}


def prompts(own, cache, *splits, shots=3, split=None, **changes):  # noqa: F811
    """Return (question, examples) of every prompt of a task that has these splits."""
    for name in splits:
        write_rows(cache / "mine" / f"{name}.jsonl", ROWS[name])
    keys = {"train": "training_split", "validation": "validation_split", "test": "test_split"}
    files = {"data_files": {name: f"{name}.jsonl" for name in splits}}
    own_splits = {keys[name]: name for name in splits} | {keys[name]: None for name in keys if name not in splits}
    (task,) = load_task(own(dataset_kwargs=files, **own_splits, **changes), split, ())
    assert isinstance(task, LoadedTask)
    task.prepare(shots, 5)
    task.task.build_all_requests(limit=None, rank=0, world_size=1)
    found = {}
    for instance in task.task.instances:
        *examples, question = instance.args[0].split("\n\n")
        found[question] = [example.removesuffix(" yes") for example in examples]
    assert all(len(set(examples)) == shots for examples in found.values())
    return found


@pytest.mark.parametrize(
    ("splits", "changes", "split", "source"),
    [
        (("train", "validation", "test"), {}, None, "train"),
        (("train", "validation", "test"), {}, "validation", "train"),
        (("train", "validation"), {}, None, "train"),
        (("train", "test"), {"fewshot_split": "test"}, None, "train"),  # the file names the scored split
        (("train", "validation"), {"fewshot_split": "validation"}, None, "train"),
        (("train", "validation", "test"), {"fewshot_split": "validation"}, "validation", "train"),
        (("train", "validation", "test"), {"fewshot_split": "validation"}, None, "validation"),  # named, not scored
        (("validation", "test"), {}, None, "validation"),
        (("test",), {}, None, "test"),
        (("validation",), {}, None, "validation"),
        (("validation", "test"), {"fewshot_split": "test"}, None, "validation"),
        (("validation",), {"fewshot_split": "validation"}, None, "validation"),
        (("test",), {"fewshot_split": "test", "fewshot_config": {"sampler": "first_n"}}, None, "test"),
    ],
)
def test_examples_come_from_rows_that_are_not_asked(own, cache, splits, changes, split, source):  # noqa: F811
    found = prompts(own, cache, *splits, split=split, **changes)
    assert len(found) == 8
    assert all(example.startswith(source) for examples in found.values() for example in examples)
    assert all(question not in examples for question, examples in found.items())


def test_examples_that_the_file_holds_are_taken(own, cache):  # noqa: F811
    held = [{"q": f"held{k}", "c": ["yes", "no"], "a": "yes"} for k in range(3)]
    found = prompts(own, cache, "test", fewshot_config={"samples": held, "sampler": "first_n"})
    assert set(map(tuple, found.values())) == {("held0", "held1", "held2")}


def test_scored_rows_as_examples_are_noted_and_one_row_is_not_enough(own, cache, model, tokenizer):  # noqa: F811
    write_rows(cache / "mine" / "test.jsonl", ROWS["test"][:3])
    path = own(training_split=None, dataset_kwargs={"data_files": {"test": "test.jsonl"}})
    notes = evaluate_model(model, tokenizer, [path], num_fewshot=2).notes
    assert notes == ["my_sums has no other rows: its solved examples are scored questions, none before itself."]
    with pytest.raises(EvaluationError, match="num_fewshot 3 is above the 2 examples of my_sums; lower it"):
        check_tasks([path], num_fewshot=3)


def test_as_many_examples_as_rows_are_refused_where_lm_eval_draws_one_more(cache):
    # Without a test split, lm-eval draws one more than asked and leaves the question out: 2 of 2 rows is too many.
    with pytest.raises(EvaluationError, match="num_fewshot 2 is above the 1 examples of winogrande"):
        check_tasks(["winogrande"], num_fewshot=2)


def test_a_task_that_fixes_its_examples_at_none_says_so(own, model, tokenizer):  # noqa: F811
    notes = evaluate_model(model, tokenizer, [own(num_fewshot=0)], num_fewshot=2).notes
    assert notes == ["my_sums is asked without solved examples: its own definition fixes their number at 0."]
    assert TASK["task"] == "my_sums"
