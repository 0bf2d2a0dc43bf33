"""The golden cases, through the public entry point."""

import pytest
from golden_cases import assert_golden, assert_golden_delta, flatten, golden_cases, golden_updates

from fedproxy.strategies.aggregators import Aggregator


@pytest.mark.parametrize("case", golden_cases("fedavg", "ties", "h_ties"))
def test_merged_update_equals_the_golden_value(case):
    aggregation = Aggregator.by_name(case["rule"])(**case["options"]).aggregate(golden_updates(case))
    assert_golden_delta(aggregation, case)


@pytest.mark.parametrize("case", golden_cases("h_ties"))
def test_h_ties_figures_equal_the_golden_values(case):
    aggregation = Aggregator.by_name("h_ties")(**case["options"]).aggregate(golden_updates(case))
    for figure in ("weights", "heterogeneity", "retention"):
        assert_golden(list(aggregation.diagnostics[figure].values()), case["diagnostics"][figure])
    assert_golden(flatten(aggregation.conflict), case["diagnostics"]["conflict"])
