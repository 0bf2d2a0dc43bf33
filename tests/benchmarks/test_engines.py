"""The comparison of engines, at a tiny size: all sides run, return the same bits, and ratios follow from the times."""

import pytest

from benchmarks import engines

TINY = {**engines.DEFAULTS, "model": "asset:tiny-llama", "rounds": "2", "clients": "2", "rows": "2", "words": "5"}


@pytest.mark.slow
def test_all_engines_are_measured():
    figures = engines.main(TINY)
    sides = {"in_process", "1 worker", "2 workers"}
    assert set(figures["seconds_per_round"]) == set(figures["first_round_seconds"]) == sides
    assert figures["same_bits"]
    assert figures["clients"] == 2
    assert len(figures["throughput_ratios"]) == 2
    low, high = sorted(figures["throughput_ratios"])
    assert figures["throughput_2_workers_over_1"] == pytest.approx((low + high) / 2)
    # starting a process is no part of a round's time
    assert figures["first_round_seconds"]["1 worker"] > figures["seconds_per_round"]["1 worker"]
    assert 0 <= figures["overhead_1_worker"] < 1


def test_bits_that_differ_end_the_comparison(make_updates):
    reference = {}
    engines._compare(reference, make_updates(1.0))
    engines._compare(reference, make_updates(1.0))
    with pytest.raises(SystemExit, match="client_000: w differs between engines"):
        engines._compare(reference, make_updates(1.0 + 2**-20))


@pytest.fixture
def make_updates():
    import torch

    from fedproxy.protocol import ClientUpdate

    def make(value):
        return [ClientUpdate("client_000", {"w": torch.tensor([value])}, num_examples=1, num_tokens=1, train_loss=0.0)]

    return make
