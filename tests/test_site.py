"""The built site: no warning, no page without a place, no dead link, and nothing asked of another host."""

import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote

import pytest

from fedproxy import api

ROOT = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("sphinx") is None, reason="the site needs the extra docs: make docs"),
]


class Page(HTMLParser):
    """Names of a page's places, where its links lead, and what it loads."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loads = set(), [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids |= {given[name] for name in ("id", "name") if given.get(name)}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag in ("link", "script", "img", "iframe"):
            self.loads.append(given.get("src") or given.get("href") or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Every page of the site, by path."""
    out = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-W",
        "--keep-going",
        "-n",
        "-b",
        "html",
        "-c",
        "docs",
        ".",
        str(out),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return out, {path.relative_to(out): Page(path) for path in out.rglob("*.html")}


def test_no_link_of_a_page_is_dead(site):
    out, pages = site
    assert len(pages) > 60
    for name, page in pages.items():
        for link in (link for link in page.links if not link.startswith(("http", "mailto:"))):
            target, _, place = link.partition("#")
            path = (out / name.parent / unquote(target)).resolve() if target else out / name
            assert path.is_file(), f"{name}: {link}"
            if place and path.suffix == ".html":
                assert unquote(place) in pages[path.relative_to(out)].ids, f"{name}: {link}"


def test_nothing_comes_from_another_host(site):
    for name, page in site[1].items():
        assert not [load for load in page.loads if load.startswith(("http", "//"))], name


def test_every_public_object_has_a_place(site):
    pages = site[1]
    for name in api.__all__:
        assert f"fedproxy.api.{name}" in pages[Path(f"docs/api/{name}.html")].ids


def test_llms_txt_lists_every_page(site):
    out, pages = site
    text = (out / "llms.txt").read_text()
    made = {"genindex.html", "search.html", "index.html", "docs/contents.html"}
    listed = {str(name) for name in pages if f"](_sources/{name.with_suffix('.md.txt')}):" in text}
    deeper = {str(name) for name in pages if name.parent == Path("docs/api") and name.stem != "index"}
    assert {str(name) for name in pages} - listed == made | deeper
    for line in text.splitlines():
        if line.startswith("- ["):
            assert (out / line.partition("](")[2].partition("):")[0]).is_file()
