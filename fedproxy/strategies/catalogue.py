"""The tables of docs/strategies, generated from the component classes: ``python -m fedproxy.strategies.catalogue``.

Without an argument the page is printed; with a path it is written there. A test keeps the committed page current.
"""

import dataclasses
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path

from fedproxy.registry import Component
from fedproxy.strategies.aggregators import Aggregator
from fedproxy.strategies.regularizers import Regularizer
from fedproxy.strategies.server_optimizers import ServerOptimizer

_FACTS = {
    "linear": "linear: may run under secure aggregation",
    "mixed_ranks": "mixed LoRA ranks",
    "stateful": "keeps memory across rounds",
    "keeps_shared_memory": "server keeps and broadcasts memory",
}


def render() -> str:
    """Return the catalogue page as Markdown."""
    parts = [
        "# Catalogue of strategies",
        "Generated from the classes by `python -m fedproxy.strategies.catalogue docs/strategies/catalogue.md`; "
        "do not edit by hand. `K` clients send updates `Delta_k` of `P` coordinates; `p_k` is a client's share of the "
        "examples, and `s = alpha / r` the LoRA scaling. A definition is the rule in plain torch, to read beside its "
        "paper.",
        *_family("Aggregators", "aggregator", Aggregator),
        *_family("Regularizers and client corrections", "regularizer", Regularizer),
        *_family("Server optimizers", "server_optimizer", ServerOptimizer),
    ]
    return "\n\n".join(parts) + "\n"


def _family(title: str, key: str, family: type[Component]) -> list[str]:
    members = [family.by_name(name) for name in family.names()]
    rows = [_row(member) for member in members]
    table = "\n".join(
        ["| name | what it does | can do | options and defaults | reference |", "|---|---|---|---|---|", *rows]
    )
    details = [f"### `{key}: {{name: {member.name}}}`\n\n{_describe(member)}" for member in members]
    return [f"## {title}", table, *details]


def _row(member: type[Component]) -> str:
    first = inspect.cleandoc(member.__doc__ or "").splitlines()[0]
    options = ", ".join(f"`{f.name}={f.default}`" for f in dataclasses.fields(member))
    cells = (f"`{member.name}`", first, "; ".join(_capabilities(member)), options, getattr(member, "reference", ""))
    return "| " + " | ".join(_cell(text) for text in cells) + " |"


def _describe(member: type[Component]) -> str:
    text = inspect.cleandoc(member.__doc__ or "").replace("``", "`").replace("||", "\\|\\|")
    file, _, function = getattr(member, "definition", "").partition(".")
    if not file:
        return text
    return f"{text}\n\nDefinition: `{function}` in `fedproxy/strategies/functional/{file}.py`."


_PARTS = {"conflict": "needs the conflict map", "control_variates": "clients keep memory"}


def _capabilities(member: type[Component]) -> Sequence[str]:
    parts = [_PARTS[part] for part in getattr(member, "parts", ()) if part in _PARTS]
    found = parts + [text for fact, text in _FACTS.items() if getattr(member, fact, False)]
    space = getattr(member, "space", "any")
    if space != "any":
        found.append(f"{space} space only")
    found += [f"needs clients' `{group}`" for group in getattr(member, "needs_extras", ())]
    return found


def _cell(text: str) -> str:
    return text.replace("``", "`").replace("|", "\\|") or "-"


def main(arguments: Sequence[str]) -> None:
    """Print the page, or write it to the path given."""
    if arguments:
        Path(arguments[0]).write_text(render(), encoding="utf-8")
    else:
        sys.stdout.write(render())


if __name__ == "__main__":
    main(sys.argv[1:])
