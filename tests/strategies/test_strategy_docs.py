"""The documentation is generated or executed, so that it cannot go stale."""

import re
from pathlib import Path

import torch

from fedproxy.protocol import ClientUpdate
from fedproxy.strategies.aggregators import Aggregator
from fedproxy.strategies.catalogue import main, render

DOCS = Path(__file__).parents[2] / "docs" / "strategies"


def test_the_catalogue_is_current(tmp_path):
    main([str(tmp_path / "catalogue.md")])
    assert (tmp_path / "catalogue.md").read_text() == render()
    assert (DOCS / "catalogue.md").read_text() == render(), (
        "run python -m fedproxy.strategies.catalogue docs/strategies/catalogue.md"
    )
    for name in Aggregator.names():
        assert f"| `{name}` |" in render()


def test_the_example_of_write_your_own_runs(monkeypatch, tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", (DOCS / "write_your_own.md").read_text(), flags=re.DOTALL)
    (tmp_path / "my_rules.py").write_text(example)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(Aggregator, "_members", dict(Aggregator._members))
    __import__("my_rules")
    rule = Aggregator.by_name("soft_sign")(bound=1.0)
    updates = [
        ClientUpdate("a", {"w": torch.tensor([100.0, 0.0])}),
        ClientUpdate("b", {"w": torch.tensor([0.0, -100.0])}),
    ]
    result = rule.aggregate(updates)
    # tanh(100) = 1: half of the bound each
    torch.testing.assert_close(result.delta["w"], torch.tensor([0.5, -0.5]))
    assert result.diagnostics["cosine"] == [[1.0, 0.0], [0.0, 1.0]]


def test_every_rule_that_the_pages_name_exists():
    text = (DOCS / "README.md").read_text()
    table = text[text.index("## Which aggregator?") : text.index("Rules of thumb")]
    known = set(Aggregator.names())
    named = set(re.findall(r"`([a-z_]+)`", table)) - {"length", "mixed_ranks", "factor_mean_error"}
    assert named <= known
