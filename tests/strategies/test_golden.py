"""The golden cases, through the public entry point."""

import pytest
import torch

from fedproxy.strategies.aggregators import Aggregator
from fedproxy.strategies.functional.robust import krum_scores, squared_distances

from .golden_cases import assert_golden, assert_golden_delta, flatten, golden_cases, golden_updates

ALL_RULES = (
    "config",
    "fedavg",
    "geometric_median",
    "h_ties",
    "krum",
    "median",
    "multi_krum",
    "task_arithmetic",
    "ties",
    "trimmed_mean",
)


@pytest.mark.parametrize("case", golden_cases(*ALL_RULES))
def test_merged_update_equals_the_golden_value(case):
    aggregation = Aggregator.by_name(case["rule"])(**case["options"]).aggregate(golden_updates(case))
    assert_golden_delta(aggregation, case)


@pytest.mark.parametrize("case", golden_cases("h_ties"))
def test_h_ties_figures_equal_the_golden_values(case):
    aggregation = Aggregator.by_name("h_ties")(**case["options"]).aggregate(golden_updates(case))
    for figure in ("weights", "heterogeneity", "retention"):
        assert_golden(aggregation.diagnostics[figure], case["diagnostics"][figure])
    assert_golden(flatten(aggregation.conflict), case["diagnostics"]["conflict"])


@pytest.mark.parametrize("case", golden_cases("krum", "multi_krum"))
def test_krum_scores_equal_the_golden_values(case):
    rows = torch.stack([flatten(update.delta) for update in golden_updates(case)])
    scores = krum_scores(squared_distances(rows @ rows.T), case["options"]["byzantine"])
    assert_golden(scores, case["diagnostics"]["scores"])
