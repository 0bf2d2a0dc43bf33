"""Generated data for recipes that must run anywhere in a minute: four small multiple-choice tasks and plain sentences.

Each task asks about a closed set of facts in changing words, so a small model learns it within a few dozen steps, and a
question of the test split is never one of the train split. Layout, as for the real sets::

    tiny-qa/<task>/<split>.jsonl       query ("Question: ... Answer:"), choices (four strings), gold (index), id
    tiny-calibration/calibration.jsonl text, key: sentences of the same vocabulary; no question among them
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from fedproxy.data.assets.entries import Asset
from fedproxy.data.assets.qa import write_rows
from fedproxy.seeding import derive_seed

_NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hal", "Ida", "Jo", "Kim", "Leo")
_OPENINGS = ("", "{name} asks: ", "{name} wants to know: ", "Please tell {name}: ")
_CHOICES = 4
_SPLITS = {"train": 400, "validation": 100, "test": 200}


@dataclass(frozen=True)
class TinyTask:
    """A closed set of facts and the ways to ask for them."""

    questions: tuple[str, ...]
    """Ways to ask; ``{item}`` stands for the fact's item."""
    facts: Mapping[str, str]
    """Answer by item; wrong choices are other facts' answers."""


def _facts(**items_by_answer: str) -> dict[str, str]:
    return {item: answer for answer, items in items_by_answer.items() for item in items.split()}


_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
_PAIRS = ["hot-cold", "big-small", "fast-slow", "old-new", "wet-dry", "full-empty", "hard-soft", "loud-quiet"]

TASKS: dict[str, TinyTask] = {
    "tiny_colors": TinyTask(
        ("What color is the {item}?", "The {item} has which color?", "Which color does the {item} have?"),
        _facts(
            red="rose cherry brick",
            blue="sky lake jeans",
            green="grass frog leaf",
            yellow="sun lemon duck",
            white="snow milk swan",
            black="coal crow tire",
        ),
    ),
    "tiny_sums": TinyTask(
        ("How much is {item}?", "What is the sum {item}?", "What does {item} make?"),
        {f"{_NUMBERS[a]} plus {_NUMBERS[b]}": _NUMBERS[a + b] for a, b in product(range(1, 5), repeat=2)},
    ),
    "tiny_opposites": TinyTask(
        ("What is the opposite of {item}?", "Which word is contrary to {item}?", "Not {item} but what?"),
        {a: b for pair in _PAIRS for a, b in (pair.split("-"), pair.split("-")[::-1])},
    ),
    "tiny_places": TinyTask(
        ("Where does the {item} live?", "Where can I find the {item}?", "What is the home of the {item}?"),
        _facts(
            sea="whale shark crab",
            forest="deer bear owl",
            farm="cow pig hen",
            desert="camel lizard scorpion",
            house="cat mouse spider",
            river="otter beaver trout",
        ),
    ),
}


def task_rows(name: str, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Return a task's rows by split: 400 to train on, 100 for validation, 200 to test; every question is asked once."""
    task = TASKS[name]
    rng = random.Random(derive_seed(seed, "tiny task", name))
    answers = sorted(set(task.facts.values()))
    asked = {
        opening.format(name=person) + question.format(item=item): item
        for opening, person, question, item in product(_OPENINGS, _NAMES, task.questions, task.facts)
    }
    drawn = rng.sample(sorted(asked), sum(_SPLITS.values()))
    rows = []
    for question in drawn:
        right = task.facts[asked[question]]
        choices = [right, *rng.sample([answer for answer in answers if answer != right], _CHOICES - 1)]
        rng.shuffle(choices)
        rows.append({"query": f"Question: {question}\nAnswer:", "choices": choices, "gold": choices.index(right)})
    splits, start = {}, 0
    for split, size in _SPLITS.items():
        splits[split] = [{**row, "id": i} for i, row in enumerate(rows[start : start + size])]
        start += size
    return splits


def sentences(rows: int, seed: int) -> list[str]:
    """Return plain texts of four sentences each, over the words of the tasks and with none of their questions."""
    rng = random.Random(derive_seed(seed, "tiny sentences"))
    things = [item for name in ("tiny_colors", "tiny_places") for item in TASKS[name].facts]
    kinds = list(TASKS["tiny_opposites"].facts) + sorted(set(TASKS["tiny_colors"].facts.values()))
    places = sorted(set(TASKS["tiny_places"].facts.values()))

    def sentence() -> str:
        thing, kind, place, name = rng.choice(things), rng.choice(kinds), rng.choice(places), rng.choice(_NAMES)
        count = rng.choice(_NUMBERS[2:])
        return rng.choice(
            (
                f"{name} sees the {thing} at the {place}.",
                f"The {thing} of {name} is {kind}.",
                f"{name} and {rng.choice(_NAMES)} find {count} {kind} things.",
                f"It is {kind} in the {place}, and {name} looks for the {thing}.",
            )
        )

    return [" ".join(sentence() for _ in range(4)) for _ in range(rows)]


def make_tasks(asset: Asset, wheels: Sequence[Path], out: Path) -> None:
    """Write the tasks; option ``seed``."""
    for name in TASKS:
        for split, rows in task_rows(name, asset.options["seed"]).items():
            write_rows(out / name / f"{split}.jsonl", iter(rows))


def make_calibration(asset: Asset, wheels: Sequence[Path], out: Path) -> None:
    """Write the calibration text; options ``rows`` and ``seed``."""
    texts = sentences(asset.options["rows"], asset.options["seed"])
    rows: Iterator[dict[str, Any]] = (
        {"text": text, "key": f"tiny-calibration/{index}"} for index, text in enumerate(texts)
    )
    write_rows(out / "calibration.jsonl", rows)
