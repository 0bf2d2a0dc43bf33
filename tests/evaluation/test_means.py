import pytest

from fedproxy.evaluation.means import mean_over_models


def samples(*nlls):
    return [{"task": "ward", "doc_hash": str(i), "acc": i % 2, "answer_nll": nll} for i, nll in enumerate(nlls)]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_figure_that_one_model_lacks_has_no_mean(order):
    models = [samples(1.0, 2.0), samples(3.0, None)]  # null: it was not a number
    scores = [{"ward": {"acc": 0.5, "acc_stderr": 0.5, "answer_nll": nll}} for nll in (1.5, None)]
    found, means = mean_over_models([scores[k] for k in order], [models[k] for k in order])
    assert [mean.get("answer_nll") for mean in means] == [2.0, None]
    assert [mean["acc"] for mean in means] == [0, 1]
    assert found["ward"]["answer_nll"] is None
    assert found["ward"]["acc"] == 0.5
    assert found["ward"]["acc_stderr"] == pytest.approx(0.5)  # of shares 0 and 1: sqrt(0.5 / 2)
