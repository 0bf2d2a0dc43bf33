"""The rule by hand, and a run with it."""

from pathlib import Path

import pytest
import torch
from fedproxy_huber import Huber, huber_mean

from fedproxy import fit
from fedproxy.errors import ConfigError


def test_an_outlier_counts_as_one_that_is_near():
    # median 2, deviations 1, 0, 98: their median is 1, so that 98 counts as 1.4826
    deltas = torch.tensor([[1.0], [2.0], [100.0]])
    assert huber_mean(deltas, 1.0).item() == pytest.approx(2 + (-1 + 0 + 1.4826) / 3, abs=1e-6)


def test_without_an_outlier_it_is_the_mean():
    deltas = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(huber_mean(deltas, 1e6), deltas.mean(dim=0))


def test_a_bound_below_zero_is_refused():
    with pytest.raises(ConfigError, match=r"aggregator.bound must be more than 0, got -1"):
        Huber(bound=-1)


def test_the_recipe_runs(tmp_path, capsys):
    recipe = Path(__file__).parent.parent / "huber.yaml"
    fit.main(
        [f"recipe={recipe}", "plugins=[fedproxy_huber]", f"output_dir={tmp_path}/run", "data.rows_per_task=16",
         "federation.rounds=1", "evaluation.limit=4", "trainer.accelerator=cpu"]
    )  # fmt: skip
    assert "report: " in capsys.readouterr().out
    assert "huber" in (tmp_path / "run" / "report.md").read_text()
