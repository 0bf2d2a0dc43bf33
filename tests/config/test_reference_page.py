"""docs/configuration.md is what the classes say."""

import importlib.util
from pathlib import Path

DOCS = Path(__file__).parent.parent.parent / "docs"


def test_page_is_current():
    spec = importlib.util.spec_from_file_location("configuration_reference", DOCS / "configuration_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (DOCS / "configuration.md").read_text() == module.page(), "run: python docs/configuration_reference.py"
