"""How Sphinx builds the site: `make docs`. Pages are those that GitHub shows; the repository is the source folder."""

import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.ext.napoleon import Config, GoogleDocstring

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import fedproxy  # noqa: E402

project = "FedProxy"
release = version = fedproxy.__version__
copyright = "the FedProxy developers, Apache-2.0"  # noqa: A001 (the name that Sphinx reads)

# autodoc on the names of fedproxy.api, and no page for each of the other modules: those may change, and what their
# docstrings refer to would have to be exempt from -n by hundreds.
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton"]
root_doc = "docs/contents"
include_patterns = ["*.md", "docs/**.md", "examples/*/README.md"]
exclude_patterns = [".*", "build", "dist", "runs", "docs/_build", "fedproxy", "tests", "benchmarks"]
exclude_patterns += ["docs/results/attack.md", "docs/results/strategies.md"]  # tables alone, without a heading
nitpicky = True
nitpick_ignore_regex = [
    # Of other libraries, whose sites are not asked: the site is built without a network.
    (r"py:.*", r"(torch|transformers|lightning|collections|pathlib|typing|abc)\..*"),
    (r"py:.*", r"Tensor|PreTrained\w+|PretrainedConfig|Path|Any|ClassVar|Literal|Callable|Iterable|Iterator"),
    # Of this package, beyond what fedproxy.api promises.
    (r"py:.*", r"fedproxy\.(?!api\.).*"),
    (r"py:exc", r"(Asset|Checkpoint|Client|Config|Data|Evaluation|Model)Error"),
]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 80

html_theme = "furo"
html_title = f"FedProxy {release}"
html_extra_path = ["site"]
html_show_sourcelink = False
pygments_style, pygments_dark_style = "default", "github-dark"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def read_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Turn a Google docstring into reStructuredText; a field's has no sections, and a colon in it ends no type."""
    lines[:] = [re.sub(r"(?<=[(\s])\*(?=\w+\))", r"\\*", line) for line in lines]  # (clients, *shape)
    if what not in ("attribute", "property"):
        lines[:] = GoogleDocstring(lines, Config(napoleon_use_rtype=False), app, what, name, obj, options).lines()


def plain_signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Write a default that is made anew for each instance as ``...``."""
    return (None if signature is None else signature.replace("<factory>", "...")), returns


def write_llms(app: Sphinx, error: Exception | None) -> None:
    """Write llms.txt: every page in its group, as plain text, with what it begins with."""
    if error is not None or app.builder.name != "html":
        return
    contents, lines = app.env.get_doctree(root_doc), [f"# {project}"]
    lines.append(f"> {_first_paragraph(contents)}")
    for tree in contents.findall(addnodes.toctree):
        lines += ["", f"## {tree['caption']}", ""]
        for page in tree["includefiles"]:
            title = app.env.titles[page].astext()
            lines.append(f"- [{title}](_sources/{page}.md.txt): {_first_paragraph(app.env.get_doctree(page))}")
    Path(app.outdir, "llms.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _first_paragraph(page: nodes.document) -> str:
    found = next((part for part in page.findall(nodes.paragraph) if isinstance(part.parent, nodes.section)), None)
    return " ".join("" if found is None else found.astext().split())


def setup(app: Sphinx) -> None:
    """Connect what this site does itself."""
    app.connect("autodoc-process-docstring", read_docstring)
    app.connect("autodoc-process-signature", plain_signature)
    app.connect("build-finished", write_llms)
