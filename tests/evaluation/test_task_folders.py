"""``include_path``: task files found by the names that they give."""

import pytest
import yaml

from fedproxy.errors import EvaluationError
from fedproxy.evaluation.harness import evaluate_model
from fedproxy.evaluation.task_folders import named_files
from fedproxy.evaluation.task_loading import expand

from .conftest import write_rows

SUMS = {
    "task": "my_sums", "tag": "mine", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "sums.jsonl"}},
    "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "Sum: {{a}} + 1 =",
    "doc_to_choice": ["1", "2", "3"], "doc_to_target": "{{a}}",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "tasks"
    write_rows(root / "sub" / "sums.jsonl", [{"a": a} for a in (0, 1, 2)])
    base = {key: value for key, value in SUMS.items() if key not in ("task", "tag")}
    put(root, "sub/_base.yaml", base)
    put(root, "sub/sums.yaml", {"include": "_base.yaml", "task": "my_sums", "tag": "mine"})
    put(root, "sub/more.yml", {"include": "_base.yaml", "task": "more_sums", "tag": ["mine", "other"]})
    put(root, "group.yaml", {"group": "all_of_mine", "task": ["my_sums", "inner"]})
    put(root, "inner.yaml", {"group": "inner", "task": ["other"]})
    return root


def put(root, name, content):
    (root / name).write_text(content if isinstance(content, str) else yaml.safe_dump(content))


def test_names_tags_and_groups_stand_for_their_files(folder):
    sums, more = str(folder / "sub/sums.yaml"), str(folder / "sub/more.yml")
    found = named_files(str(folder))
    assert found["my_sums"] == [sums]
    assert found["mine"] == [more, sums]
    assert found["inner"] == [more]
    assert found["all_of_mine"] == [sums, more]
    assert expand(["tiny_sums", "my_sums"], str(folder)) == ["tiny_sums", sums]


def test_they_are_scored(folder, model, tokenizer, cache):
    scores = evaluate_model(model, tokenizer, expand(["all_of_mine"], str(folder))).scores
    assert list(scores) == ["my_sums", "more_sums"]
    assert scores["my_sums"]["n"] == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("twin.yaml", {"task": "my_sums"}, "names 'my_sums', as another file does; rename one"),
        ("code.yaml", "task: x\ndoc_to_text: !function a.b\n", r"code.yaml: .*Python code \(!function\)"),
        ("loop.yaml", {"group": "loop", "task": ["loop"]}, "group 'loop' holds itself; remove it there"),
        ("lost.yaml", {"group": "lost", "task": ["nowhere"]}, "group 'lost' lists 'nowhere', which no file"),
        ("empty.yaml", {"group": "empty", "task": []}, "group empty.yaml must list names under `task`"),
        ("text.yaml", "just words", "text.yaml must hold a mapping"),
    ],
)
def test_a_folder_that_cannot_be_used_is_one_line(folder, name, content, message):
    put(folder, name, content)
    with pytest.raises(EvaluationError, match=message):
        named_files(str(folder))


@pytest.mark.parametrize("folder", ["{}/nowhere", "~nobody_of_this_name/nowhere", "{}/" + 300 * "a" + "nowhere"])
def test_no_folder_is_one_line(tmp_path, folder):
    with pytest.raises(EvaluationError, match=r"evaluation.include_path: .* is no folder; correct the path"):
        expand(["my_sums"], folder.format(tmp_path))


def test_too_many_files_are_refused(tmp_path):
    for number in range(1001):
        (tmp_path / f"{number}.yaml").touch()
    with pytest.raises(EvaluationError, match=r"holds 1001 task files, at most 1000 are read; name a smaller folder"):
        named_files(str(tmp_path))
