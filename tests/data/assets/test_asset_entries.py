"""The shipped catalog: every entry is complete, and its conversion exists."""

import importlib
import re

import pytest

from fedproxy.data.assets import catalog, store


@pytest.mark.parametrize("name", list(catalog()))
def test_every_entry_is_complete(name):
    asset = catalog()[name]
    assert re.fullmatch(r"[a-z0-9-]+", name)  # no dot, no slash: temporary folders and asset:NAME/file rely on it
    assert asset.kind in {"model", "tasks", "text"}
    assert asset.licence
    assert asset.about
    module, _, function = store._CONVERSIONS[asset.conversion].partition(":")
    assert callable(getattr(importlib.import_module(module), function))
    for wheel in asset.wheels:
        assert re.fullmatch(r"[0-9a-f]{64}", wheel.sha256)
        assert wheel.file.startswith(f"{wheel.name.replace('-', '_')}-{wheel.version}-")


def test_every_conversion_is_used():
    assert {asset.conversion for asset in catalog().values()} == set(store._CONVERSIONS)
