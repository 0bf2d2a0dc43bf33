"""Write a tutorial's page as a notebook, for Jupyter and Colab: ``python docs/notebooks.py``.

The page is the source. Text becomes Markdown cells, Python blocks become cells, and so does every block of commands,
each command behind ``!``. The first code cell installs FedProxy.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TUTORIALS = Path(__file__).parent / "tutorials"
PAGES = ("your_model_and_data",)
INSTALL = """\
source = "../.."  # the clone that this notebook lies in; elsewhere git+https://..., or a wheel that you uploaded
%pip install --quiet {source}"""
_BLOCK = re.compile(r"^```(bash|python)\n(.*?)\n```$", re.DOTALL | re.MULTILINE)
_OF_THE_PAGE = re.compile(r"^This page as a notebook.*?\n\n", re.DOTALL | re.MULTILINE)


def notebook(page: str) -> str:
    """Return the notebook of a page's text as JSON, the same bytes for the same text."""
    cells = [
        {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": text.splitlines(keepends=True)}
        | ({"execution_count": None, "outputs": []} if kind == "code" else {})
        for number, (kind, text) in enumerate(_cells(_OF_THE_PAGE.sub("", page)))
    ]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    whole: dict[str, Any] = {
        "cells": cells,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def _cells(page: str) -> Iterator[tuple[str, str]]:
    """Yield what kind of cell, and its text."""
    prose, *blocks = _BLOCK.split(page)
    yield "markdown", prose.strip()
    for language, block, prose in zip(blocks[::3], blocks[1::3], blocks[2::3], strict=True):
        yield "code", block if language == "python" else _shell(block)
        if prose.strip():
            yield "markdown", prose.strip()


def _shell(block: str) -> str:
    """Return commands as a cell runs them; a command that goes on in the next line stays one."""
    if block.startswith("pip install"):
        return INSTALL
    return re.sub(r"^(?! )", "!", block, flags=re.MULTILINE)


if __name__ == "__main__":
    for name in PAGES:
        text = (TUTORIALS / f"{name}.md").read_text(encoding="utf-8")
        (TUTORIALS / f"{name}.ipynb").write_text(notebook(text), encoding="utf-8")
