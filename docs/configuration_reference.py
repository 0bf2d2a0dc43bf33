"""Writes docs/configuration.md from the configuration's own classes: `python docs/configuration_reference.py`."""

from collections.abc import Iterable
from pathlib import Path

from fedproxy.config import RunConfig
from fedproxy.config.keys import Key, families, first_line, leaves, mappings

PAGE = Path(__file__).with_name("configuration.md")
HEAD = """# Configuration

Every key of a recipe, with its default and its meaning. Look keys up here; to begin, copy a recipe that is near to what
you want ([your model and your data](tutorials/your_model_and_data.md)).

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
- `python -m fedproxy.fit --help` lists the keys with their defaults, `--help aggregator` or `--help client.lr` says all
  about a node or a key.
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
ABOUT = {
    "parts": (
        "What else rides with a round: `parts.precision.up=int8`, or in a recipe `parts: {precision: {up: int8}}`."
    ),
    "evaluation.evaluators": (
        "What models are asked: `evaluation.evaluators.own_data.max_new_tokens=32`. A member without options here "
        "takes its settings from `evaluation` itself."
    ),
}
"""What is said of the nodes that hold several components."""


def main() -> None:
    """Write the page."""
    PAGE.write_text(page())


def page() -> str:
    """Return the whole page."""
    sections = [HEAD, "## Keys\n\n" + table(leaves(RunConfig))]
    for path, family, _ in families(RunConfig):
        sections.append(f"## `{path}`\n\n{first_line(family)}\n")
        for name in family.names():
            member = family.by_name(name)
            sections.append(f"`{path}.name={name}`: {first_line(member)}\n" + options(member, f"{path}."))
    for path, members in mappings(RunConfig):
        sections.append(f"## `{path}`\n\n{ABOUT[path]}\n")
        for member in members:
            about = f"`{path}.{member.name}`: {first_line(member)}\n"
            sections.append(about + options(member, f"{path}.{member.name}."))
    return "\n".join(sections)


def options(member: type, prefix: str) -> str:
    """Return a component's options as a table, empty where it has none."""
    rows = list(leaves(member, prefix))
    return f"\n{table(rows)}" if rows else ""


def table(keys: Iterable[Key]) -> str:
    """Return keys as a Markdown table."""
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key in keys:
        kind, meaning = key.kind.replace("|", "or"), key.meaning.replace("|", "\\|")
        default = "*required*" if key.default is None else f"`{key.default}`"
        lines.append(f"| `{key.path}` | {kind} | {default} | {meaning} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
