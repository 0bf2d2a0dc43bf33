import json
import re

import pytest
import yaml

from fedproxy.errors import EvaluationError
from fedproxy.evaluation.harness import check_tasks, evaluate_model
from fedproxy.evaluation.own_tasks import own_sha256
from fedproxy.evaluation.task_rows import check_data_tasks, render_rows

from .conftest import write_rows

SUMS = [{"q": f"{k} + 1 =", "c": [str(k), str(k + 1)], "a": str(k + 1)} for k in range(6)]
TASK = {
    "task": "my_sums",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"train": "train.jsonl", "test": "test.jsonl"}},
    "training_split": "train",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{q}}",
    "doc_to_choice": "c",
    "doc_to_target": "{{c.index(a)}}",
}


@pytest.fixture
def own(cache):
    """Return what writes a task file beside its data."""
    folder = cache / "mine"
    write_rows(folder / "train.jsonl", SUMS[:4])
    write_rows(folder / "test.jsonl", SUMS[2:])

    def write(text=None, name="my_sums.yaml", **changes):
        path = folder / name
        path.write_text(text or yaml.safe_dump(TASK | changes))
        return str(path)

    return write


def test_a_file_beside_its_data_is_scored_and_trained_on(own, model, tokenizer):
    path = own()
    check_tasks([path], limit=4, num_fewshot=2)
    check_data_tasks([path])
    result = evaluate_model(model, tokenizer, [path], num_fewshot=2)
    assert result.scores["my_sums"]["n"] == 4
    assert {sample["task"] for sample in result.samples} == {"my_sums"}
    assert "mine" not in json.dumps(result.lm_eval)  # no folder of this machine
    assert [(row.prompt, row.target, row.key) for row in render_rows(path, limit=2)] == [
        ("0 + 1 =", " 1", "my_sums/train/0"),
        ("1 + 1 =", " 2", "my_sums/train/1"),
    ]


def test_changed_data_are_a_new_task(own, model, tokenizer):
    path = own()
    before = own_sha256(path)
    assert evaluate_model(model, tokenizer, [path]).scores["my_sums"]["n"] == 4
    write_rows(own.__closure__[0].cell_contents / "test.jsonl", SUMS[:3])
    assert own_sha256(path) != before
    assert evaluate_model(model, tokenizer, [path]).scores["my_sums"]["n"] == 3


def test_a_file_may_include_another_of_its_own_or_of_lm_eval(own, cache):
    own(yaml.safe_dump({"doc_to_text": "Sum: {{q}}"}), name="prompt.yml")
    theirs = {"include": "arc/arc_easy.yaml", "task": "my_arc", "dataset_path": "json", "test_split": None}
    theirs["dataset_kwargs"] = {"data_files": {"train": str(cache / "qa/arc_easy/train.jsonl")}}
    theirs |= {"validation_split": "train"}
    base = {key: value for key, value in TASK.items() if key != "doc_to_text"}
    assert render_rows(own(yaml.safe_dump(base | {"include": "prompt.yml"})))[0].prompt == "Sum: 0 + 1 ="
    assert render_rows(own(yaml.safe_dump(theirs)))[0] == render_rows("arc_easy")[0].__class__(
        *(getattr(render_rows("arc_easy")[0], name) for name in ("prompt", "target")), "my_arc", "my_arc/train/0", 1
    )


def test_csv_and_parquet_are_read(own, cache):
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_rows(cache / "mine" / "a.csv", [])
    (cache / "mine" / "a.csv").write_text("q;right\n1 + 1 =;2\n2 + 1 =;3\n")
    pq.write_table(pa.table({"q": ["1 + 1 ="], "right": [2]}), cache / "mine" / "a.parquet")
    changes = {"training_split": "train", "test_split": None, "validation_split": "train", "doc_to_choice": ["2", "3"]}
    changes["doc_to_target"] = "{{['2', '3'].index(right|string)}}"
    for kind, options in (("csv", {"delimiter": ";"}), ("parquet", {})):
        kwargs = {"data_files": {"train": f"a.{kind}"}, **options}
        assert render_rows(own(**changes, dataset_path=kind, dataset_kwargs=kwargs))[0].target == " 2"


TOUCH = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
LAUGHS = "".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}' if n else 'ha'] * 9)}]\n" for n in range(9))  # 9 ** 9 texts
REFUSED = {
    "function": ("task: x\ndoc_to_text: !function utils.text\n", r"my_sums.yaml asks for Python code \(!function\)"),
    "object": ("task: !!python/object/apply:os.getcwd []\n", "is not valid YAML"),
    "class": ({"class": "x"}, "key 'class' is not one that a task file may have"),
    "custom": ({"custom_dataset": "x"}, "key 'custom_dataset' is not one"),
    "unsafe": ({"unsafe_code": False}, "key 'unsafe_code' is not one"),
    "process": ({"process_docs": "utils.docs"}, "process_docs must be null"),
    "metric": ({"metric_list": [{"metric": "./evil"}]}, r"metric_list: '\./evil' is not one of lm-eval's metrics"),
    "hf_metric": ({"metric_list": [{"metric": "acc", "hf_evaluate": True}]}, "'acc' is not one of lm-eval's metrics"),
    "generate": ({"generation_kwargs": {"custom_generate": "x/y", "trust_remote_code": True}}, "generation_kwargs may"),
    "script": ({"dataset_path": "./loader.py"}, "dataset_path must be csv, json, parquet, text with data_files"),
    "address": ({"dataset_kwargs": {"data_files": {"test": "http://x/y.jsonl"}}}, "there is no file http://x/y.jsonl"),
    "remote": ({"dataset_kwargs": {"data_files": "test.jsonl", "trust_remote_code": True}}, "got 'trust_remote_code'"),
    "missing": ({"dataset_kwargs": {"data_files": {"test": "tset.jsonl"}}}, "there is no file tset.jsonl"),
    "split": ({"validation_split": "dev"}, r"validation_split: 'dev' is not in data_files \(test, train\)"),
    "key": ({"doc_to_txt": "q"}, "key 'doc_to_txt' is not one .* did you mean 'doc_to_text'"),
    "group": ({"group": "mine", "task": ["a"]}, "it names a group; name the files of its tasks"),
    "name": ({"task": "arc_easy"}, "'arc_easy' is the name of another task"),
    "no_name": ({"task": None}, "a name must be a text of 1 to 100"),
    "include": ({"include": "../../../etc/nothing.yaml"}, "neither a file beside it nor one of lm-eval's"),
    "itself": ({"include": "my_sums.yaml"}, "it includes itself"),
    "include_number": ({"include": 7}, "include must be a file or a list of files, got 7"),
    "date": (
        "task: x\ndataset_path: !!timestamp x\n",
        "is not valid YAML .*tag tag:yaml.org,2002:timestamp is not read",
    ),
    "laughs": (LAUGHS, "is not valid YAML .it stands for more than 50000 values"),
    "twice": ("task: x\ntask: y\n", "is not valid YAML .*'task' stands twice"),
    "list": ("- a\n- b\n", "must hold a mapping"),
    "endless": (
        "task: x\ndataset_path: json\ndataset_kwargs: {data_files: &a {train: *a}}\n",
        "an anchor holds itself",
    ),
    "deep": ("[" * 5000, "is not valid YAML"),
    "type": ({"output_type": "essay"}, "lm-eval cannot load it"),
    "template": ({"doc_to_text": TOUCH}, "lm-eval cannot load it .SecurityError"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_run_code_or_cannot_be_read_is_refused_in_one_line(case, own):
    given, message = REFUSED[case]
    path = own(given) if isinstance(given, str) else own(**given)
    with pytest.raises(EvaluationError, match=message) as error:
        check_tasks([path])
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"task file {path}: ")


def test_a_missing_file_a_pipe_and_a_foreign_parquet_column_are_refused(own, cache):
    import os

    from datasets import Dataset, Image

    with pytest.raises(EvaluationError, match="cannot be read"):
        check_tasks([str(cache / "nothing.yaml")])
    os.mkfifo(cache / "pipe.yaml")
    with pytest.raises(EvaluationError, match="it is not a regular file"):
        check_tasks([str(cache / "pipe.yaml")])
    images = Dataset.from_dict({"q": ["x"], "picture": [{"bytes": b"x", "path": None}]})
    images.cast_column("picture", Image(decode=False)).to_parquet(cache / "mine" / "images.parquet")
    kwargs = {"data_files": {"train": "images.parquet", "test": "images.parquet"}}
    with pytest.raises(EvaluationError, match=re.escape("images.parquet has a column of type Image; leave it out")):
        check_tasks([own(dataset_path="parquet", dataset_kwargs=kwargs)])


def test_a_template_sees_its_row_and_nothing_of_python_in_any_row(own, model, tokenizer):
    # The first row alone is tried when a task is loaded.
    hidden = own(doc_to_text="{{ ''.__class__.__mro__ if '3' in q else q }}")
    with pytest.raises(EvaluationError, match=r"a prompt cannot be written \(SecurityError"):
        evaluate_model(model, tokenizer, [hidden])


def test_a_task_that_runs_what_a_model_writes_is_refused_whoever_includes_it(own):
    # Its file says unsafe_code, which no other file may take back.
    path = own(include="cruxeval/cruxeval_common_yaml", process_docs=None, doc_to_choice=None, dataset_name=None,
               output_type="generate_until", doc_to_target="{{a}}")  # fmt: skip
    with pytest.raises(EvaluationError, match="task 'my_sums' runs code that a model writes, which FedProxy does not"):
        check_tasks([path])
