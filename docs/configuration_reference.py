"""Writes docs/configuration.md from the configuration's own classes: `python docs/configuration_reference.py`."""

import ast
import dataclasses
import inspect
import textwrap
import typing
from pathlib import Path
from typing import Any

from fedproxy.config import RunConfig
from fedproxy.evaluation.evaluators import Evaluator
from fedproxy.registry import Component
from fedproxy.strategies.round_parts import RoundPart

PAGE = Path(__file__).with_name("configuration.md")
HEAD = """# Configuration

`python -m fedproxy.fit recipe=NAME key=value ...` reads defaults < recipe < command line. A recipe is a YAML file of
the keys below; `extends: NAME` at its top takes over another recipe.

- Lists are written `data.tasks=[arc_easy,csqa]`, no value `null`.
- `<node>.name` picks a class, and the class's options are the node's keys. Where the command line (or an extending
  recipe) names another class, the options that were set for the old one are dropped.
- `trainer.*` takes every option of `lightning.Trainer`, except those that a key below sets.
- `plugins=[my_package.my_module]` imports your own classes first; their names and options work like the built-in ones.
- `overwrite=true` deletes a run, and `accept_changed` lets one start go on with changed inputs. Both count on the
  command line alone: a recipe file that sets them is refused. What is deleted, and what never, is in
  [architecture.md](architecture.md#the-run-folder); what a downloaded recipe may do is in [security.md](security.md).
- `${key}` is replaced by that key's value, once, after everything is merged. Nothing else behind a `$` is read, no
  environment variable either: on the command line the shell puts those in.
- A mistake ends with one line that names the key, the rule and the nearest known name, and exit code 2. It is found
  before anything large is imported, in about half a second.

## What a recipe file may do

A recipe may come from anywhere, a run's `config.yaml` included. It is plain YAML of at most 256 KiB: no tags, no key
twice, at most 30 levels, and anchors that stand for at most 50,000 values. Numbers are written `7`, `0x1f`, `0.5` or
`1e-3`; `010`, `1_000`, `12:30` and dates are text.

A recipe can list `plugins`, but it cannot make FedProxy import them. Importing a module runs it, so the command line
has to name them again: `plugins=[my_module]`, or `plugins=[]` to go without. That holds for every command that reads a
recipe: `fit`, also with `resume=auto`, `compress`, `compare` and `recipes plan`. `recipes ls`, `show` and `cp` import
nothing. Modules are looked up as Python does it, and `python -m` looks into the working directory first. So start
FedProxy in a folder whose files you trust, or with `python -P -m fedproxy.fit`, which leaves that folder out.

This page is generated from the classes by `python docs/configuration_reference.py`.
"""


def main() -> None:
    """Write the page."""
    PAGE.write_text(page())


def page() -> str:
    """Return the whole page."""
    sections = [HEAD, "## Keys\n\n" + table(leaves(RunConfig, ""))]
    for path, family in families(RunConfig, ""):
        sections.append(f"## `{path}`\n\n{first_line(family)}\n")
        for name in family.names():
            member = family.by_name(name)
            rows = leaves(member, f"{path}.")
            sections.append(f"`{path}.name={name}`: {first_line(member)}\n" + (f"\n{table(rows)}" if rows else ""))
    sections.append(
        "## `parts`\n\nWhat else rides with a round: `parts.precision.up=int8`, or in a recipe "
        "`parts: {precision: {up: int8}}`.\n"
    )
    for name in RoundPart.names():
        member = RoundPart.by_name(name)
        if member.optional:
            sections.append(f"`parts.{name}`: {first_line(member)}\n\n{table(leaves(member, f'parts.{name}.'))}")
    sections.append(
        "## `evaluation.evaluators`\n\nWhat models are asked: `evaluation.evaluators.own_data.max_new_tokens=32`. "
        "A member without options here takes its settings from `evaluation` itself.\n"
    )
    for name in Evaluator.names():
        rows = leaves(Evaluator.by_name(name), f"evaluation.evaluators.{name}.")
        about = f"`evaluation.evaluators.{name}`: {first_line(Evaluator.by_name(name))}\n"
        sections.append(about + (f"\n{table(rows)}" if rows else ""))
    return "\n".join(sections)


def leaves(cls: type, prefix: str) -> list[tuple[str, str, str, str]]:
    """Return (key, type, default, meaning) of every plain field, nested dataclasses included, components not."""
    rows = []
    hints, texts = typing.get_type_hints(cls), attribute_docs(cls)
    for item in dataclasses.fields(cls):
        hint = hints[item.name]
        kind = (typing.get_args(hint) or (hint,))[-1]  # of a component, or of a mapping of them
        if isinstance(kind, type) and issubclass(kind, Component):
            continue
        if dataclasses.is_dataclass(hint):
            rows += leaves(typing.cast(type, hint), f"{prefix}{item.name}.")
        else:
            rows.append((prefix + item.name, type_name(hint), default(item), texts.get(item.name, "")))
    return rows


def families(cls: type, prefix: str) -> list[tuple[str, type[Component]]]:
    """Return (path, family) of every component node."""
    found = []
    for name, hint in typing.get_type_hints(cls).items():
        if isinstance(hint, type) and issubclass(hint, Component):
            found.append((prefix + name, hint))
        elif dataclasses.is_dataclass(hint):
            found += families(typing.cast(type, hint), f"{prefix}{name}.")
    return found


def attribute_docs(cls: type) -> dict[str, str]:
    """Return the strings that stand under a class's fields, base classes included."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            is_text = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text:
                texts[field.target.id] = " ".join(str(text.value.value).split())  # type: ignore[attr-defined]
    return texts


def default(item: dataclasses.Field[Any]) -> str:
    """Return a field's default as it is written on the command line."""
    if item.default is not dataclasses.MISSING:
        value = item.default
    elif item.default_factory is not dataclasses.MISSING:
        value = item.default_factory()
    else:
        return "*required*"
    if isinstance(value, list | tuple):
        return f"`[{','.join(map(str, value))}]`"
    return "`null`" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def type_name(hint: Any) -> str:
    """Return a type as a reader of YAML thinks of it."""
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(f"`{value}`" for value in typing.get_args(hint))
    return str(getattr(hint, "__name__", hint) if not typing.get_args(hint) else hint).replace("typing.", "")


def table(rows: list[tuple[str, str, str, str]]) -> str:
    """Return rows as a Markdown table."""
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    lines += [
        "| " + " | ".join((f"`{k}`", t.replace("|", "or"), d, m.replace("|", "\\|"))) + " |" for k, t, d, m in rows
    ]
    return "\n".join(lines) + "\n"


def first_line(cls: type) -> str:
    """Return the first line of a class's docstring."""
    return (inspect.getdoc(cls) or "").splitlines()[0]


if __name__ == "__main__":
    main()
