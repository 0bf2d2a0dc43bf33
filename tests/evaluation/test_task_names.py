"""Tags stand for their tasks, and every name that the documentation offers has data where it says."""

import re
from pathlib import Path

import pytest
from lm_eval.tasks import TaskManager

from fedproxy.data.assets import cache_root
from fedproxy.errors import EvaluationError
from fedproxy.evaluation import hub_tasks
from fedproxy.evaluation.harness import check_tasks, evaluate_model
from fedproxy.evaluation.offline_tasks import lm_eval_folder, offline_tasks
from fedproxy.evaluation.task_loading import expand
from fedproxy.evaluation.task_rows import check_data_tasks, render_rows

from .conftest import write_rows
from .test_harness import rows_of
from .test_own_tasks import own  # noqa: F401 (a fixture)

DOCS = Path(__file__).parents[2] / "docs"
GROUP = "group: both_arcs\ntask: [arc_easy, ai2_arc]\nmetadata: {version: 1}\n"
CHANGED = "group: changed\ntask:\n  - task: arc_easy\n    num_fewshot: 3\n"


@pytest.fixture
def arc_index(tmp_path, monkeypatch):
    """lm-eval's arc tasks with their tag, and two groups, in place of all tasks, whose index takes seconds to build."""
    folder = tmp_path / "groups"
    folder.mkdir()
    (folder / "both.yaml").write_text(GROUP)
    (folder / "changed.yaml").write_text(CHANGED)
    index = TaskManager(include_path=[lm_eval_folder() / "tasks" / "arc", folder], include_defaults=False)
    monkeypatch.setattr(hub_tasks, "hub_manager", lambda: index)


@pytest.mark.usefixtures("arc_index")
def test_a_tag_and_a_plain_group_are_their_tasks(cache):
    assert expand(["boolq", "ai2_arc"]) == ["boolq", "arc_challenge", "arc_easy"]
    assert expand(["both_arcs"]) == ["arc_easy", "arc_challenge", "arc_easy"]
    assert expand(["changed"]) == ["changed"]  # its tasks are other tasks than those of their names
    with pytest.raises(EvaluationError, match=r"evaluation.tasks names 'arc_easy' twice"):
        check_tasks(["ai2_arc", "arc_easy"])


@pytest.mark.usefixtures("arc_index")
def test_a_tag_with_local_tasks_is_scored_and_one_without_is_refused(cache, model, tokenizer):
    with pytest.raises(EvaluationError, match=r"task 'arc_challenge' has no local test data .* fetch qa"):
        check_tasks(["ai2_arc"])
    with pytest.raises(EvaluationError, match="'ai2_arc' stands for 2 tasks: arc_challenge, arc_easy; name one"):
        render_rows("ai2_arc")
    for split in ("train", "validation", "test"):
        write_rows(cache / "qa" / "arc_challenge" / f"{split}.jsonl", rows_of(cache, f"arc_easy/{split}.jsonl"))
    check_tasks(["ai2_arc"], limit=5)
    check_data_tasks(["ai2_arc"])
    scores = evaluate_model(model, tokenizer, ["ai2_arc"], limit=2).scores
    assert list(scores) == ["arc_challenge", "arc_easy"]
    assert scores["arc_challenge"] == scores["arc_easy"]  # the same questions


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"output_type": "generate_until", "doc_to_choice": None, "doc_to_target": "{{a}}"},
            r"data.tasks: my_sums is not multiple choice \(generate_until\), so it has no rows to train on",
        ),
        ({"training_split": None}, "data.tasks: my_sums has no train split to train on; leave it out"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_before_any_work(own, changes, message):  # noqa: F811
    path = own(**changes)
    for refuse in (lambda: check_data_tasks([path]), lambda: render_rows(path)):
        with pytest.raises(EvaluationError, match=message):
            refuse()


def test_local_tasks_without_train_rows_are_refused_as_data(cache):
    with pytest.raises(EvaluationError, match="'boolq' has no local train data"):
        check_data_tasks(["arc_easy", "boolq"])


def test_every_data_set_of_the_documentation_has_a_task_that_scores_a_split_it_has():
    text = (DOCS / "data.md").read_text().partition("## Questions and answers")[2].partition("\n## ")[0]
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    offered = {}
    for first, *counts, _ in table[2:]:
        splits = {split for split, count in zip(("train", "validation", "test"), counts, strict=True) if count}
        for name in re.findall(r"[a-z0-9_]+", re.split(r" \(|, and", first)[0]):
            offered[name] = splits
    assert {"arc_easy", "sciq", "copa", "rte"} <= set(offered)
    for name, splits in offered.items():
        assert offline_tasks()[name].scored_split(None) in splits


def test_sciq_is_scored_on_the_split_that_the_asset_has(cache, model, tokenizer):
    row = {"question": "What is red?", "support": "Grass is green.", "correct_answer": "a tomato"}
    row |= {"distractor1": "grass", "distractor2": "snow", "distractor3": "the sky"}
    write_rows(cache_root() / "qa" / "sciq" / "validation.jsonl", [row, row])
    check_tasks(["sciq"], limit=2)
    assert evaluate_model(model, tokenizer, ["sciq"]).scores["sciq"]["n"] == 2
