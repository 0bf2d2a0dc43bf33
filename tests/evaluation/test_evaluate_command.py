import json
import subprocess
import sys
from dataclasses import replace

import pytest
from transformers import BertConfig, BertForMaskedLM

from fedproxy import evaluate
from fedproxy.data.sources import read_rows
from fedproxy.errors import ConfigError, DataError, EvaluationError, ModelError
from fedproxy.evaluation.evaluators.own_data import OwnData
from fedproxy.evaluation.own_data import score_rows
from fedproxy.locks import locked
from fedproxy.models.logit_offset import LogitOffsetModel

from .conftest import write_rows


@pytest.fixture
def checkpoint(tmp_path, model, tokenizer):
    folder = tmp_path / "checkpoint"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_result_files(cache, checkpoint, tmp_path, capsys):
    arguments = [f"model={checkpoint}", "tasks=[arc_easy,boolq]", "limit=2", "seed=7", f"output_dir={tmp_path}/found"]
    evaluate.main(arguments)
    scores = json.loads((tmp_path / "found" / "scores.json").read_text())
    samples = [json.loads(line) for line in (tmp_path / "found" / "samples.jsonl").read_text().splitlines()]
    results = json.loads((tmp_path / "found" / "results.json").read_text())
    assert set(scores["scores"]) == {"arc_easy", "boolq", "mean"}
    assert scores["scores"]["mean"]["n"] == len(samples) == 4
    assert scores["settings"]["seed"] == 7
    right = [sample["acc"] for sample in samples if sample["task"] == "arc_easy"]
    assert scores["scores"]["arc_easy"]["acc"] == sum(right) / 2 == results["results"]["arc_easy"]["acc,none"]
    printed = capsys.readouterr().out
    assert f"{100 * sum(right) / 2:.1f} ± " in printed
    with pytest.raises(ConfigError, match="already holds scores; add overwrite=true or choose another output_dir"):
        evaluate.main(arguments)
    evaluate.main([*arguments, "overwrite=true"])


def test_a_folder_of_joined_models_is_scored_like_its_target(cache, checkpoint, model, tokenizer, tmp_path):
    LogitOffsetModel(model, model, model).save_pretrained(tmp_path / "joined")
    tokenizer.save_pretrained(tmp_path / "joined")
    for name, folder in (("one", checkpoint), ("three", tmp_path / "joined")):
        evaluate.main([f"model={folder}", "tasks=[arc_easy]", "limit=2", f"output_dir={tmp_path}/{name}"])
    one, three = (json.loads((tmp_path / name / "scores.json").read_text())["scores"] for name in ("one", "three"))
    assert one["arc_easy"]["acc"] == three["arc_easy"]["acc"]


def test_rows_of_ones_own_with_and_without_tasks(cache, checkpoint, model, tokenizer, tmp_path, capsys):
    write_rows(tmp_path / "ward.jsonl", [{"prompt": "The sky is", "target": "blue"}, {"prompt": "2", "target": "3"}])
    words = [f"model={checkpoint}", f"files.ward={tmp_path}/ward.jsonl", "max_new_tokens=3"]
    evaluate.main([*words, f"output_dir={tmp_path}/alone"])
    alone = json.loads((tmp_path / "alone" / "scores.json").read_text())["scores"]
    assert set(alone) == {"ward", "mean"}
    assert {"answer_nll", "exact_match", "f1"} <= alone["ward"].keys()
    rows = [replace(row, ends=True) for row in read_rows("ward", str(tmp_path / "ward.jsonl"))]
    by_a_run = score_rows(model, tokenizer, {"ward": rows}, OwnData(max_new_tokens=3)).scores["ward"]
    assert alone["ward"] == pytest.approx(by_a_run)  # a run reads the rows of files with their ends
    assert "exact_match" in capsys.readouterr().out
    evaluate.main([*words, "tasks=[arc_easy]", f"output_dir={tmp_path}/both"])
    both = json.loads((tmp_path / "both" / "scores.json").read_text())["scores"]
    assert both["ward"] == alone["ward"]
    assert both["arc_easy"]["n"] == 5
    assert set(json.loads((tmp_path / "both" / "results.json").read_text())["configs"]) == {"arc_easy", "ward"}


def test_a_model_that_sees_the_answer_is_refused(cache, tokenizer, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    folder = tmp_path / "bert"
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_rows(tmp_path / "ward.jsonl", [{"prompt": "one two", "target": "three"}])
    for asked in ("tasks=[arc_easy]", f"files.ward={tmp_path}/ward.jsonl"):
        with pytest.raises(ModelError, match=r"BertLMHeadModel is not causal: .*; give a decoder-only causal LM"):
            evaluate.main([f"model={folder}", asked, "limit=2", f"output_dir={tmp_path / 'scores'}"])
    assert not (tmp_path / "scores/scores.json").exists()


def test_likelihoods_that_are_no_numbers_are_told_and_kept_as_json(cache, checkpoint, model, tmp_path, capsys):
    model.lm_head.weight.data.fill_(float("nan"))  # what a half-precision overflow comes to
    model.save_pretrained(checkpoint)
    write_rows(tmp_path / "ward.jsonl", [{"prompt": "The sky is", "target": "blue"}] * 2)
    words = [f"model={checkpoint}", "tasks=[arc_easy]", f"files.ward={tmp_path}/ward.jsonl", "max_new_tokens=0"]
    evaluate.main([*words, f"output_dir={tmp_path}/found"])
    lost = ["arc_easy: at 5 of 5 questions", "ward: at 2 of 2 questions"]
    notes = json.loads((tmp_path / "found" / "scores.json").read_text())["notes"]
    assert [note.split(" the model's")[0] for note in notes if "(NaN)" in note] == lost
    assert "note: ward: at 2 of 2 questions the model's likelihoods are not numbers (NaN)" in capsys.readouterr().out

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    lines = (tmp_path / "found" / "samples.jsonl").read_text().splitlines()
    samples = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [sample["answer_nll"] for sample in samples] == [None] * 7


def test_a_file_named_like_a_task_of_a_tag_is_refused(cache, tmp_path):
    write_rows(tmp_path / "ward.jsonl", [{"prompt": "The sky is", "target": "blue"}])
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/mine.yaml").write_text(
        "task: mine\ntag: ours\ndataset_path: json\ndataset_kwargs: {data_files: {test: ../ward.jsonl}}\n"
        "test_split: test\noutput_type: generate_until\ndoc_to_text: '{{prompt}}'\ndoc_to_target: '{{target}}'\n"
    )
    path = str(tmp_path / "tasks/mine.yaml")
    words = ["model=x", "tasks=[ours]", f"include_path={tmp_path}/tasks", f"output_dir={tmp_path}/none"]
    with pytest.raises(ConfigError, match=r"is also the name of a task; name the file otherwise"):
        evaluate.main([*words, f"files={{'{path}': {tmp_path}/ward.jsonl}}"])


def test_files_of_others_and_a_folder_in_use_are_left_alone(tmp_path):
    words = ["model=x", "tasks=[arc_easy]", f"output_dir={tmp_path}", "overwrite=true"]
    for name, content in (
        ("results.json", "{}"),
        ("samples.jsonl", ""),
        ("scores.json", '{"mine": 1}'),
        ("scores.json", "["),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ConfigError, match=rf"{name} was written by something else; move it away or choose another"):
            evaluate.main(words)
        assert (tmp_path / name).read_text() == content
        (tmp_path / name).unlink()
    with locked(tmp_path), pytest.raises(ConfigError, match=r"is in use by process \d+ on"):
        evaluate.main(words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["model=x", "tasks"], ConfigError, "'tasks' is no key=value argument; write, for example, limit=100"),
        (["modl=x"], ConfigError, r"unknown argument 'modl'; did you mean 'model'\?"),
        (["tasks=[arc_easy]"], ConfigError, "model is missing; write, for example, model=asset:smollm2-135m"),
        (["model=x"], ConfigError, "tasks is missing; write, for example, "),
        (["model=x", "tasks=[a]", "fewshot_as_multiturn=true"], ConfigError, "needs apply_chat_template=true; add it"),
        (["model=x", "files.mean=b"], ConfigError, "files.mean is also the name of the mean over sources; name the"),
        (["model=x", "tasks=[boolq]", "files.BoolQ=b"], ConfigError, "files.BoolQ is also the name of a task; name"),
        (["model=x", "files.a=nowhere.jsonl"], DataError, "nowhere.jsonl does not exist"),
        (["model=x", "files.a=b", "max_new_tokens=-1"], ConfigError, "max_new_tokens must be at least 0, got -1"),
        (["model=x", "tasks=[arc_easy]", "limit=many"], ConfigError, "limit must be a whole number, or null, got 'ma"),
        (["model=x", "files.a=b", "limit=0"], ConfigError, "limit must be at least 1, or null for all questions, got"),
        (["model=x", "files.a=b", "num_fewshot=-1"], ConfigError, "num_fewshot must be at least 0, got -1"),
        (["model=x", "files.a=b", "batch_tokens=0"], ConfigError, "batch_tokens must be at least 1, got 0"),
        (["model=x", "files.a=b", "batch_size=-2"], ConfigError, "batch_size must be at least 1, got -2"),
        (["model=x", "files.a=b", "files.A=c"], ConfigError, "files: the names 'a' and 'A' differ in case or compos"),
        (["model=x", "files.a.b=c"], ConfigError, "files.a must be a text, got a mapping: a dot in a key begins"),
        (["model=x", "files.a=${oc.env:HOME}"], ConfigError, r"files.a: \$\{oc.env:HOME\} is not read"),
        (["model=x", "tasks={a: b}"], ConfigError, r"tasks\[0\] must be a text, got a mapping"),
        (["model=x", "tasks=[a]", "dtype=int8"], ConfigError, "^dtype must be one of float32, bfloat16, float16, got"),
        (["model=x", "tasks=[a]", "overwrite=3"], ConfigError, "^overwrite must be true or false, got 3"),
        (["model=x", "tasks=[a]", "output_dir="], ConfigError, "^output_dir must be a folder, got an empty text; give"),
        (["model=x", "files.a=b", "device=nowhere"], ConfigError, "^device=nowhere cannot be used here .Expected one"),
        (["model=x", "files.a=b", "device=meta"], ConfigError, "^device=meta cannot be used here .*; give cpu, cuda"),
        (["model=x", "files.a=b", "device=cuda:99"], ConfigError, "^device=cuda:99 cannot be used here .*; give cpu"),
        (["model=x", "tasks=[arc_easy]", "limit=99"], EvaluationError, "evaluation.limit 99 is above the 5 questions"),
    ],
)
def test_errors_are_one_line(cache, tmp_path, arguments, error, message):
    with pytest.raises(error, match=message) as raised:
        evaluate.main([f"output_dir={tmp_path}/none", *arguments])
    assert "\n" not in str(raised.value)


def test_an_error_ends_with_exit_code_2():
    command = [sys.executable, "-m", "fedproxy.evaluate", "modl=x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["error: unknown argument 'modl'; did you mean 'model'?"]
