import math

import pytest

from fedproxy.task_means import mean_scores


def test_mean_has_only_metrics_that_every_task_has():
    # stderr of the mean: sqrt(.03^2 + .04^2) / 2 = .025
    mean = mean_scores(
        {
            "a": {"acc": 0.4, "acc_stderr": 0.03, "acc_norm": 0.5, "n": 100},
            "b": {"acc": 0.6, "acc_stderr": 0.04, "n": 50},
            "mean": {"acc": 9.0},
        }
    )
    assert mean == {"acc": pytest.approx(0.5), "acc_stderr": pytest.approx(0.025), "n": 150}
    assert mean_scores({}) == {}


def test_mean_of_an_unknown_value_is_unknown():
    assert mean_scores({"a": {"acc": 0.4}, "b": {"acc": math.nan}}) == {"acc": None}
    assert mean_scores({"a": {"acc": 0.4}, "b": {"acc": None}}) == {"acc": None}
    assert mean_scores({"a": {"acc": 1e308}, "b": {"acc": 1e308}}) == {"acc": None}  # no number holds 2e308
    assert mean_scores({"a": {"acc_stderr": 1e200}}) == {"acc_stderr": None}
