"""Open questions and exams: hand-made documents in a wheel of the same form, then all of the real ones."""

import gzip
import io
import json
import zipfile

import pyarrow as pa
import pytest

from fedproxy.data.assets import catalog, fetch, open_qa
from fedproxy.errors import AssetError

COUNTS = {
    "open-qa": {
        "gsm8k/test": 1319, "triviaqa/validation": 7993, "nq_open/validation": 3610, "drop/validation": 1000,
        "squad/validation": 1000,
    },
    "exams": {"medmcqa/validation": 4183, "medqa/test": 1273, "mmlu/anatomy/test": 135, "mmlu/anatomy/dev": 5},
}  # fmt: skip
GSM = {"question": "1 + 1?", "answer": "1 + 1 = 2\n#### 2", "short_answer": "2", "id": 0, "choices": ["x"]}
DROP = {"query_id": "q", "passage": "P", "question": "Q?", "answers": [["two", "2"], ["both"]], "query": "P Q?"}
SQUAD = {"id": "s", "title": "T", "query": "T P Q?", "answers_text": ["a", "a", "b"], "choices": ["a"]}
MED = {"question": "Q", "opa": "a", "opb": "b", "opc": "c", "opd": "d", "cop": 2, "exp": None, "query": "x"}
MEDQA = {"query": "Q\nAnswer:", "choices": ["A", "B"], "gold": 1, "answer": "x"}
ANSWER = {"value": "v", "aliases": ["v"]}
TRIVIA = {"question": "Q?", "question_id": "t", "search_results": {"rank": []}, "answer": {**ANSWER, "type": "x"}}
NQ = {"question": "Q", "answer": ["a", "b"]}
MMLU = {"question": "Q", "subject": "anatomy", "choices": ["a", "b", "c", "d"], "answer": 3}


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "some.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, document, lines in (
            ("gsm8k/gold_bpb_5shot", GSM, 1), ("drop/bpb_5shot", DROP, 1), ("squad/bpb_5shot", SQUAD, 1),
            ("medmcqa/mc_5shot", MED, 4), ("medqa_en/mc_5shot", MEDQA, 2),
        ):  # fmt: skip
            requests = [{"doc_id": number, "doc": document} for number in range(2) for _ in range(lines)]
            content = gzip.compress("".join(json.dumps(request) + "\n" for request in requests).encode())
            archive.writestr(open_qa._REQUESTS.format(member), content)
        for member, row in (
            ("trivia_qa/rc.wikipedia.nocontext/validation", TRIVIA), ("nq_open/none/validation", NQ),
            ("hails/mmlu_no_train/anatomy/test", MMLU), ("hails/mmlu_no_train/anatomy/dev", MMLU),
        ):  # fmt: skip
            table, buffer = pa.Table.from_pylist([row]), io.BytesIO()
            with pa.ipc.new_stream(buffer, table.schema) as stream:
                stream.write_table(table)
            archive.writestr(open_qa._ARROW.format(member), buffer.getvalue())
    return path


def rows_of(path):
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def test_documents_become_lm_evals_columns(wheel, tmp_path):
    open_qa.convert_open_qa(catalog()["open-qa"], [wheel], tmp_path)
    assert rows_of(tmp_path / "gsm8k/test.jsonl") == [{"question": GSM["question"], "answer": GSM["answer"]}] * 2
    (drop, _) = rows_of(tmp_path / "drop/validation.jsonl")
    assert drop["answer"]["spans"] == ["two", "2"]
    assert drop["validated_answers"]["spans"] == [["both"]]
    assert rows_of(tmp_path / "squad/validation.jsonl")[0]["answers"] == ["a", "b"]  # each once
    (trivia,) = rows_of(tmp_path / "triviaqa/validation.jsonl")
    assert trivia == {"question": "Q?", "question_id": "t", "answer": ANSWER}
    assert rows_of(tmp_path / "nq_open/validation.jsonl") == [NQ]


def test_a_question_with_choices_is_one_row(wheel, tmp_path):
    open_qa.convert_exams(catalog()["exams"], [wheel], tmp_path)
    kept = {name: MED[name] for name in ("question", "opa", "opb", "opc", "opd", "cop")}
    assert rows_of(tmp_path / "medmcqa/validation.jsonl") == [kept] * 2
    assert rows_of(tmp_path / "medqa/test.jsonl") == [{name: MEDQA[name] for name in ("query", "choices", "gold")}] * 2
    assert rows_of(tmp_path / "mmlu/anatomy/dev.jsonl") == [MMLU]


def test_another_wheel_is_one_line(tmp_path):
    with zipfile.ZipFile(tmp_path / "other.whl", "w"):
        pass
    with pytest.raises(AssetError, match=r"the wheel holds no .*gsm8k.*; the catalog and the wheel do not fit"):
        open_qa.convert_open_qa(catalog()["open-qa"], [tmp_path / "other.whl"], tmp_path)


@pytest.mark.real_model
@pytest.mark.parametrize("asset", COUNTS)
def test_every_question_is_there(asset):
    folder = fetch(asset)
    for name, count in COUNTS[asset].items():
        assert len(rows_of(folder / f"{name}.jsonl")) == count
