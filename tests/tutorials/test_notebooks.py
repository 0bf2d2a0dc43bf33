"""The notebooks are what docs/notebooks.py makes of the tutorials' pages; test_tutorials.py runs those pages."""

import ast
import importlib.util
import json

import pytest

from tests.tutorials.test_tutorials import BLOCK, PAGES


def script():
    spec = importlib.util.spec_from_file_location("notebooks", PAGES.parent / "notebooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", script().PAGES)
def test_a_notebook_is_its_page(name):
    page = (PAGES / f"{name}.md").read_text()
    made = script().notebook(page)
    assert (PAGES / f"{name}.ipynb").read_text() == made, "run: python docs/notebooks.py"
    assert f"({name}.ipynb)" in page
    assert f"({name}.ipynb)" not in made
    assert f"(tutorials/{name}.ipynb)" in (PAGES.parent / "contents.md").read_text()


def test_every_block_is_a_cell_and_the_first_one_installs():
    page = "# A\n\n```bash\npip install .\n```\n\nB\n\n```bash\nfedproxy fit a=1 \\\n    b=2\nfedproxy doctor\n```\n"
    cells = json.loads(script().notebook(page))["cells"]
    assert [cell["cell_type"] for cell in cells] == ["markdown", "code", "markdown", "code"]
    assert "%pip install --quiet {source}" in "".join(cells[1]["source"])
    assert "".join(cells[3]["source"]) == "!fedproxy fit a=1 \\\n    b=2\n!fedproxy doctor"


@pytest.mark.parametrize("name", script().PAGES)
def test_python_cells_are_those_of_the_page(name):
    cells = [cell for cell in json.loads((PAGES / f"{name}.ipynb").read_text())["cells"] if cell["cell_type"] == "code"]
    blocks = BLOCK.findall((PAGES / f"{name}.md").read_text())
    assert len(cells) == len(blocks)
    for cell, (language, text) in zip(cells, blocks, strict=True):
        if language == "python":
            assert ast.dump(ast.parse("".join(cell["source"]))) == ast.dump(ast.parse(text))
