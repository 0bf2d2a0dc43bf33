"""What cannot be asked, and what will be cut, is known before a run begins; cuts stand in its report."""

import io
import json

import pytest
import yaml
from rich.console import Console

from fedproxy.config import load_config
from fedproxy.errors import ConfigError, EvaluationError
from fedproxy.pipeline import evaluation
from fedproxy.pipeline import run as pipeline
from fedproxy.pipeline.asked import asked_of
from fedproxy.pipeline.display import Display
from fedproxy.pipeline.evaluation import evaluation_settings, expanded

from .conftest import SMALL


@pytest.fixture
def own_task(tmp_path):
    rows = [{"q": f"{k} + 1 =", "c": [str(k), str(k + 1)], "a": str(k + 1)} for k in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "my_sums", "dataset_path": "json", "dataset_kwargs": {"data_files": {"train": "rows.jsonl"}},
        "training_split": "train", "validation_split": "train", "output_type": "multiple_choice",
        "doc_to_text": "{{q}}", "doc_to_choice": "c", "doc_to_target": "{{c.index(a)}}",
    }  # fmt: skip

    def write(**changes):
        path = tmp_path / "my_sums.yaml"
        path.write_text(yaml.safe_dump(task | changes))
        return path

    return write


def test_a_task_file_is_trained_on_and_scored_and_cuts_are_in_the_report(tmp_path, own_task):
    shown, path = io.StringIO(), own_task()
    words = [
        f"data.tasks=[{path}]", "data.rows_per_task=4", f"evaluation.tasks=[{path},tiny_colors]", "evaluation.limit=3",
        "evaluation.num_fewshot=7", "evaluation.models=[target]", "federation.rounds=1",
        f"target.path={_short(tmp_path, 64)}",
    ]  # fmt: skip
    report = pipeline.run(
        load_config([*SMALL, *words, f"output_dir={tmp_path / 'run'}"]),
        Display(Console(file=shown, width=200)),
    )
    assert set(report.scores["target"]) == {"my_sums", "tiny_colors", "mean"}
    cut = "tiny_colors: 3 of 3 prompts are longer than 64 positions allow and lose their beginning; lower num_fewshot."
    scored = "my_sums has no other rows: its solved examples are scored questions, none before itself."
    assert shown.getvalue().index(f"evaluation: {cut}") < shown.getvalue().index("compressed:")
    assert {f"target: {cut}", f"target: {scored}"} <= set(report.notes)
    assert f"target: {cut}" in json.loads((tmp_path / "run/evaluation/target.scores.json").read_text())["notes"]


def test_changed_rows_of_a_task_file_are_scored_anew(own_task, tmp_path):
    config = load_config([*SMALL, f"evaluation.tasks=[{own_task()}]"])
    before = evaluation_settings(config, asked_of(config), 1)
    assert evaluation_settings(config, asked_of(config), 1) == before
    (tmp_path / "rows.jsonl").write_text('{"q": "1 + 1 =", "c": ["1", "2"], "a": "2"}\n')
    assert evaluation_settings(config, asked_of(config), 1) != before
    plain = load_config(SMALL)
    assert evaluation_settings(plain, asked_of(plain), 1)["asked"] == {"lm_eval": {}}


@pytest.mark.parametrize(
    ("words", "changes", "message"),
    [
        (
            "data.tasks=[{path}] evaluation.tasks=[tiny_colors]",
            {"output_type": "generate_until", "doc_to_choice": None},
            "data.tasks: my_sums is not multiple choice",
        ),
        (
            "evaluation.tasks=[{path}] evaluation.limit=8 target.path={short}",
            {"output_type": "generate_until", "doc_to_choice": None},
            r"'my_sums' generates up to 256 tokens after prompts of up to \d+, the model has 2 positions",
        ),
        ("evaluation.tasks=[{path}]", {"doc_to_text": "{{missing}}"}, "lm-eval cannot load it .UndefinedError"),
        ("evaluation.tasks=[{path}]", {"process_docs": "os.system"}, "process_docs must be null"),
    ],
)
def test_what_cannot_be_asked_leaves_no_folder(tmp_path, own_task, words, changes, message):
    words = words.format(path=own_task(**changes), short=_short(tmp_path, 2)).split()
    with pytest.raises(EvaluationError, match=message):
        pipeline.run(load_config([*SMALL, *words, f"output_dir={tmp_path / 'run'}"]))
    assert not (tmp_path / "run").exists()


def _short(tmp_path, positions):
    """Return the tiny model with fewer positions."""
    from fedproxy.data.assets import resolve
    from fedproxy.models import load_model, load_tokenizer

    path = resolve("asset:tiny-llama")
    model = load_model(path)
    model.config.max_position_embeddings = positions
    model.save_pretrained(tmp_path / "short")
    load_tokenizer(path).save_pretrained(tmp_path / "short")
    return tmp_path / "short"


def test_a_tag_is_several_sources(monkeypatch):
    # What lm-eval knows of tags is tested with the tasks; here, that each task is a source, and by default a client.
    def twice(names, folder):
        return [task for name in names for task in (f"{name}_1", name)]

    monkeypatch.setattr(evaluation, "expand", twice)
    config = expanded(load_config([*SMALL, "data.tasks=[tiny_sums]", "evaluation.tasks=null"]))
    assert config.data.tasks == config.evaluation_tasks == ["tiny_sums_1", "tiny_sums"]
    assert config.data.partition.count(config.data.tasks, config.data.files) == 2


def test_tasks_as_a_text_are_one_line():
    with pytest.raises(ConfigError, match=r"evaluation.tasks must be .*list"):
        load_config([*SMALL, "evaluation.tasks=tiny_colors,tiny_sums"])
