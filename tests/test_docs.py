"""Pages of the documentation: every public object has one, its example runs, and no local link is dead."""

import doctest
import re
from pathlib import Path

import pytest

from fedproxy import api

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path for pattern in ("*.md", "docs/**/*.md", "examples/*/*.md") for path in ROOT.glob(pattern))
PAGES = [path for path in PAGES if "_build" not in path.parts]
WITH_EXAMPLES = [path for path in PAGES if ">>> " in path.read_text()]


def test_every_public_object_has_a_page_with_an_example():
    pages = {path.stem: path for path in (DOCS / "api").glob("*.md") if path.stem != "index"}
    assert sorted(pages) == api.__all__
    for name, path in pages.items():
        text = path.read_text()
        assert re.search(rf"^\.\. auto\w+:: fedproxy\.api\.{name}$", text, flags=re.MULTILINE)
        assert path in WITH_EXAMPLES


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=lambda path: path.stem)
def test_examples_say_what_they_print(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    source = "\n".join(blocks)
    example = doctest.DocTestParser().get_doctest(source, {}, page.name, str(page), 0)
    said: list[str] = []
    result = doctest.DocTestRunner(verbose=False).run(example, out=said.append)
    assert result.attempted >= 2
    assert not result.failed, "".join(said)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_local_links_lead_somewhere(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?:|mailto:|#", link):
            assert (page.parent / link.partition("#")[0]).exists(), link
