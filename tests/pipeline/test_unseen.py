"""No model is scored on what clients train on, whatever way that is named."""

import json
import shutil

import pytest

from fedproxy.config import load_config
from fedproxy.data.assets import chat, open_qa
from fedproxy.errors import ConfigError
from fedproxy.evaluation.offline_tasks import offline_tasks
from fedproxy.pipeline import unseen
from fedproxy.pipeline.data import evaluation_rows
from fedproxy.pipeline.evaluation import check_comparable
from fedproxy.pipeline.unseen import check_unseen_tasks


@pytest.fixture
def ward(tmp_path, monkeypatch):
    """A folder to work in, with rows to train on and others."""
    monkeypatch.chdir(tmp_path)
    for name in ("ward/train", "other"):
        path = tmp_path / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"prompt": f"In {name}?\nAnswer:", "target": "yes"}) + "\n")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "ward/train.jsonl")
    shutil.copy(tmp_path / "ward/train.jsonl", tmp_path / "copy.jsonl")
    return tmp_path


def config(*words):
    return load_config(["recipe=fedproxy_tiny", "data.tasks=[]", *words])


WAYS = (
    "ward/train.jsonl",
    "ward",
    "./ward/train.jsonl",
    "HERE/ward/train.jsonl",
    "ward/*.jsonl",
    "link.jsonl",
    "copy.jsonl",
)


@pytest.mark.parametrize("scored", WAYS)
@pytest.mark.parametrize("trained", ["ward", "ward/tr*.jsonl", "HERE/ward/train.jsonl"])
def test_a_file_that_is_trained_on_is_refused_however_it_is_named(ward, trained, scored):
    words = [f"data.files.a={trained}", f"evaluation.files.x={scored}"]
    with pytest.raises(
        ConfigError, match=r"evaluation.files.x is data.files.a or a copy of it, which clients train on; give"
    ):
        evaluation_rows(config(*(word.replace("HERE", str(ward)) for word in words)))


def test_other_files_are_read(ward):
    (ward / "ward/test.jsonl").write_text('{"prompt": "a", "target": "b"}\n')
    words = ("data.files.a=ward", "evaluation.files.x=*.jsonl", "evaluation.files.y=ward/test.jsonl")
    for name in ("link.jsonl", "copy.jsonl"):
        (ward / name).unlink()
    assert {name: len(rows) for name, rows in evaluation_rows(config(*words)).items()} == {"x": 1, "y": 1}


def test_columns_of_training_rows_alone_are_not_asked_of_held_out_rows(ward):
    row = {"prompt": "a", "target": "b", "hospital": "north", "kind": "x"}
    (ward / "wards.jsonl").write_text(json.dumps(row) + "\n")
    words = ("data.files.a=wards.jsonl", "data.label_column=kind", "evaluation.files.x=other.jsonl")
    for partition in ("{name: by_column, column: hospital}", "{name: pooled, column: hospital}"):
        found = evaluation_rows(config(*words, f"data.partition={partition}"))
        assert [row.owner for row in found["x"]] == [None]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDPROXY_CACHE", str(tmp_path))
    for name in ("chat-qa/gsm8k/train", "chat-qa/trivia_qa/train", "open-qa/gsm8k/test", "open-qa/triviaqa/validation"):
        path = tmp_path / f"{name}.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"question": f"1+1? {name}", "answer": "2"}) + "\n")
    return tmp_path


@pytest.mark.parametrize(("trained", "task"), [("gsm8k", "gsm8k"), ("trivia_qa", "triviaqa")])
def test_a_task_that_asks_the_rows_of_a_trained_set_is_refused(cache, trained, task):
    words = (f"data.files.sums={cache}/chat-qa/{trained}", f"evaluation.tasks=[{task}]")
    said = rf"evaluation.tasks: '{task}' asks what clients train on, as data.files.sums has rows of the same set; leave"
    with pytest.raises(ConfigError, match=said):
        check_unseen_tasks(config(*words))
    with pytest.raises(ConfigError, match=said):
        check_comparable(config(*words))  # before the first run of a comparison
    check_unseen_tasks(config(*words, "evaluation.models=[]"))  # nothing is scored


def test_a_task_of_another_set_is_asked(cache):
    check_unseen_tasks(config(f"data.files.facts={cache}/chat-qa/trivia_qa", "evaluation.tasks=[gsm8k]"))


def test_held_out_rows_of_a_trained_set_are_refused(cache):
    files = [f"{cache}/chat-qa/gsm8k", f"{cache}/open-qa/gsm8k/test.jsonl"]
    for trained, scored in (files, reversed(files)):
        words = (f"data.files.sums={trained}", f"evaluation.files.x={scored}", "data.prompt_column=question")
        with pytest.raises(
            ConfigError, match=r"evaluation.files.x is data.files.sums or a copy of it, which clients train on"
        ):
            evaluation_rows(config(*words, "data.target_column=answer"))


def test_another_split_of_the_same_set_is_asked(cache):
    (cache / "open-qa/gsm8k/train.jsonl").write_text('{"question": "2+2?", "answer": "4"}\n')
    check_unseen_tasks(config(f"data.files.sums={cache}/open-qa/gsm8k/train.jsonl", "evaluation.tasks=[gsm8k]"))


def test_a_task_file_on_the_rows_that_are_trained_on_is_refused(ward):
    (ward / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\ndataset_kwargs: {data_files: {test: ward/train.jsonl}}\ntest_split: test\n"
        "output_type: generate_until\ndoc_to_text: '{{prompt}}'\ndoc_to_target: '{{target}}'\n"
    )
    words = ("data.files.a=ward", "evaluation.tasks=[mine.yaml]")
    with pytest.raises(ConfigError, match=r"'mine.yaml' asks what clients train on, as data.files.a has"):
        check_unseen_tasks(config(*words))
    check_unseen_tasks(config("data.files.a=other.jsonl", words[1]))


def test_all_sets_that_are_made_of_the_same_documents_are_known():
    """A conversation's set and a task's set share rows where they read the same member of the wheel."""
    read = {member: name for name, (member, _) in (chat._REQUESTED | chat._TABLES).items()}
    asked = open_qa._OPEN | open_qa._TABLES
    shared = {f"chat-qa/{read[member]}": f"open-qa/{task}" for task, (member, *_) in asked.items() if member in read}
    assert shared == unseen._SHARED
    scored = {file.rpartition("/")[0] for task in offline_tasks().values() for file in task.declared.values()}
    assert set(shared.values()) <= scored
