"""Every promise of docs/security.md names the tests that hold it, and they exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)))


def rows(page):
    """Return the rows of the page's tables, without heads and rulers."""
    lines = [line for line in page.splitlines() if line.startswith("|")]
    return [line for line in lines if not line.endswith("| held by |") and not re.fullmatch(r"[|\-: ]+", line)]


def names_in(path):
    return {node.name for node in ast.parse((ROOT / path).read_text()).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("path", sorted({path for path, _ in NAMED}))
def test_every_test_that_is_named_exists(path):
    assert {name for found, name in NAMED if found == path} <= {
        name for name in names_in(path) if name.startswith("test_")
    }


def test_every_promise_names_a_test():
    assert len(rows(PAGE)) >= 60
    assert not [row for row in rows(PAGE) if not re.search(r"\| (`tests/[\w/]+\.py::test_\w+`(, )?)+ \|$", row)]


def test_what_is_written_otherwise_is_found():
    assert not re.findall(r"tests/\S+::\S+", re.sub(r"`tests/[\w/]+\.py::test_\w+`", "", PAGE))
    for path in re.findall(r"`(tests/[\w/]+\.py)`", PAGE):
        assert (ROOT / path).is_file()


def test_index_and_readme_link_to_it():
    assert "(security.md)" in (ROOT / "docs" / "index.md").read_text()
    assert "(docs/security.md)" in (ROOT / "README.md").read_text()
