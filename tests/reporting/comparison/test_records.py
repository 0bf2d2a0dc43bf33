import gzip
import json
import math
from dataclasses import replace

import pytest

from fedproxy.errors import CheckpointError, EvaluationError
from fedproxy.files import packed
from fedproxy.reporting.comparison.records import Record, require_same_questions
from fedproxy.reporting.samples import load_evaluation

from .comparison_samples import make_record


def test_a_record_comes_back_as_it_was_and_holds_every_answer(tmp_path):
    record = make_record(tmp_path / "run", "fedot", 3, 0.5)
    path = record.save(tmp_path / "records" / "seed_3.json.gz")
    assert Record.load(path) == record
    evaluation = load_evaluation(tmp_path / "run", "fused")
    for task, own in record.answers["fused"].items():
        assert list(own.values["acc"]) == evaluation.values(task, "acc")
        assert list(own.values["answer_nll"]) == pytest.approx(evaluation.values(task, "answer_nll"), abs=1e-6)


def test_a_record_is_small_enough_to_be_committed(tmp_path):
    record = make_record(tmp_path / "run", "fedot", 3, 0.5)
    path = record.save(tmp_path / "r.json.gz")
    questions = 2 * 80  # two models
    assert path.stat().st_size < 4_000 + 8 * questions  # two flags and a figure of six digits each, and the report
    assert record.save(tmp_path / "again.json.gz").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{half", r"r.json.gz cannot be read: it is not valid JSON .*; delete it to run that again"),
        ('{"schema_version": 2}', r"schema_version must be 1, got 2"),
        ('{"schema_version": 1, "report": {}}', r"r.json.gz is no"),
    ],
)
def test_a_broken_record_is_one_line(tmp_path, text, message):
    path = tmp_path / "r.json.gz"
    path.write_bytes(packed(text))
    with pytest.raises(CheckpointError, match=message):
        Record.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda own: own["fused"].pop("easy"),
            r"answers.fused must have the tasks of all other models, got \['hard'\]",
        ),
        (lambda own: own["fused"].clear(), r"answers.fused must have the tasks of all other models, got \[\]"),
        (
            lambda own: own["target"]["easy"]["values"]["acc"].pop(),
            r"answers.target.easy.values must hold one number per",
        ),
        (
            lambda own: own["fused"]["easy"].update(values={"acc": []}),
            r"answers.fused.easy.values must hold one number",
        ),
        (
            lambda own: own["fused"]["easy"]["values"]["acc"].__setitem__(0, math.nan),
            r"answers.fused.easy.values must be finite",
        ),
    ],
)
def test_answers_that_do_not_pair_up_are_one_line(tmp_path, change, message):
    path = make_record(tmp_path / "run", "fedot", 3, 0.5).save(tmp_path / "r.json.gz")
    content = json.loads(gzip.decompress(path.read_bytes()))
    change(content["answers"])
    path.write_bytes(packed(json.dumps(content)))
    with pytest.raises(CheckpointError, match=rf"is not the record of a run \({message}.*; delete it to run that"):
        Record.load(path)


def changed(record, **settings):
    """Return the record with other settings of the fused model's task ``easy``."""
    own = record.answers["fused"]["easy"]
    fields = {"settings": {**own.settings, **settings}} if "questions_sha256" not in settings else settings
    return replace(record, answers={"fused": {"easy": replace(own, **fields)}})


def test_records_of_other_questions_rows_or_targets_are_refused_by_name(tmp_path):
    one = make_record(tmp_path / "a", "fedot", 3, 0.5)
    other = make_record(tmp_path / "b", "fedproxy", 3, 0.6)
    require_same_questions({"a": one, "b": other})
    with pytest.raises(
        EvaluationError, match=r"a and b cannot be compared: version of easy is 1.0 and 2.0; delete one"
    ):
        require_same_questions({"a": one, "b": changed(other, version=2.0)})
    with pytest.raises(EvaluationError, match=r"number of questions of easy is \d+ and 1; delete one"):
        require_same_questions({"a": one, "b": changed(other, questions_sha256="", values={"acc": (1.0,)})})
    with pytest.raises(EvaluationError, match=r"tasks is \['easy', 'hard'\] and \['easy'\]"):
        require_same_questions({"a": one, "b": changed(other)})
    with pytest.raises(EvaluationError, match="questions of easy is"):
        require_same_questions({"a": one, "b": changed(other, questions_sha256="00" * 32)})
    for key, value in (("data_sha256", "11" * 32), ("target_sha256", "22" * 32)):
        origin = replace(other.report.provenance, **{key: value})
        foreign = replace(other, report=replace(other.report, provenance=origin))
        with pytest.raises(EvaluationError, match=rf"{key} is .* and {value[:12]}"):
            require_same_questions({"a": one, "b": foreign})
    later = replace(other, seed=4, report=replace(other.report, provenance=replace(origin, target_sha256="ab" * 32)))
    require_same_questions({"a": one, "b": later})  # another seed draws other rows
