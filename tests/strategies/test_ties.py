"""TIES, against values worked by hand (PEERS' example and small ones of our own)."""

import pytest
import torch

from fedproxy.errors import ConfigError
from fedproxy.protocol import ClientUpdate
from fedproxy.strategies.aggregators import Aggregator

# Three clients of four coordinates, weights 1:3:1. density .5 keeps two each:
# (3, 0, 0, -4), (0, -3, 0, 5), (0, 2, 0, -2).
DELTAS = ([3.0, -1.0, 0.5, -4.0], [-2.0, -3.0, 0.1, 5.0], [1.0, 2.0, -0.2, -2.0])
EXAMPLES = (1, 3, 1)


def updates(deltas=DELTAS, examples=EXAMPLES):
    return [
        ClientUpdate(f"c{i}", {"w": torch.tensor(delta)}, num_examples=n)
        for i, (delta, n) in enumerate(zip(deltas, examples, strict=True))
    ]


def merge(deltas=DELTAS, examples=EXAMPLES, **options):
    return Aggregator.by_name("ties")(**options).aggregate(updates(deltas, examples)).delta["w"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # official: votes 3, -3 + 2 = -1, 0, -4 + 5 - 2 = -1 elect +, -, none, -; means 3, -3, 0, (-4 - 2) / 2 = -3
        ({}, [3.0, -3.0, 0.0, -3.0]),
        # mergekit: weighted votes .6, -1.8 + .4, 0, -.8 + 3 - .4 > 0; weighted means 3, -3, 0, 5
        ({"trim_scope": "tensor", "vote": "weighted", "divisor": "weight"}, [3.0, -3.0, 0.0, 5.0]),
        # PEFT: official votes; (.2 * 3) / 1, (.6 * -3) / 1, 0, (.2 * -4 + .2 * -2) / 2
        ({"trim_scope": "tensor", "divisor": "weighted_count"}, [0.6, -1.8, 0.0, -0.6]),
        # official votes with weighted means: -3 = (1 * -4 + 1 * -2) / 2
        ({"divisor": "weight"}, [3.0, -3.0, 0.0, -3.0]),
        ({"scale": 0.5}, [1.5, -1.5, 0.0, -1.5]),
    ],
)
def test_three_readings_of_ties(options, expected):
    torch.testing.assert_close(merge(density=0.5, **options), torch.tensor(expected))


def test_zero_sum_takes_the_majority_sign():
    # votes: 2 - 2 = 0, then -1, -1, +1: the majority is -, so coordinate 0 is the mean of its negative entry
    deltas = ([2.0, -1.0, -1.0, 1.0], [-2.0, -1.0, -1.0, 1.0])
    torch.testing.assert_close(merge(deltas, (1, 1), density=1.0), torch.tensor([-2.0, -1.0, -1.0, 1.0]))
    # with no majority the zero sum elects nothing
    torch.testing.assert_close(merge(([2.0, -1.0, 1.0], [-2.0, -1.0, 1.0]), (1, 1), density=1.0)[0], torch.tensor(0.0))


def test_trim_keeps_the_floor_and_prefers_the_lower_index():
    # 1000 equal magnitudes at 20 %: exactly 200 stay (the authors' code keeps 201), the first ones
    kept = merge(([1.0] * 1000,), (1,), density=0.2)
    assert kept.nonzero().squeeze(1).tolist() == list(range(200))
    # .29 * 100 is 28.999999999999996 in binary: 29 stay
    assert int(merge(([1.0] * 100,), (1,), density=0.29).sum()) == 29


def test_ties_across_tensors_are_broken_in_sorted_name_order():
    update = ClientUpdate("c", {"b": torch.ones(3), "a": torch.full((2, 2), -1.0)})
    delta = Aggregator.by_name("ties")(density=5 / 7).aggregate([update]).delta
    assert delta["a"].tolist() == [[-1.0, -1.0], [-1.0, -1.0]]
    assert delta["b"].tolist() == [1.0, 0.0, 0.0]


def test_scope_tensor_trims_each_tensor_by_itself():
    update = ClientUpdate("c", {"big": torch.tensor([9.0, 8.0]), "small": torch.tensor([0.1, 0.2])})
    rule = Aggregator.by_name("ties")
    by_all, by_tensor = (
        rule(density=0.5, trim_scope=scope).aggregate([update]).delta for scope in ("global", "tensor")
    )
    assert by_all["big"].tolist() == [9.0, 8.0]
    assert by_all["small"].tolist() == [0.0, 0.0]
    assert by_tensor["big"].tolist() == [9.0, 0.0]
    torch.testing.assert_close(by_tensor["small"], torch.tensor([0.0, 0.2]))


def test_a_count_of_zero_keeps_nothing_and_density_one_everything():
    assert merge(([1.0, 2.0],), (1,), density=0.4).tolist() == [0.0, 0.0]
    assert merge(([1.0, 2.0],), (1,), density=1.0).tolist() == [1.0, 2.0]


def test_kept_density_counts_the_merged_update():
    assert Aggregator.by_name("ties")(density=0.5).aggregate(updates()).diagnostics["kept_density"] == 0.75


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 1.5}, r"aggregator.density must be in \(0, 1\], got 1.5"),
        ({"density": 0.0}, r"aggregator.density must be in \(0, 1\], got 0.0"),
        ({"trim_scope": "layer"}, "aggregator.trim_scope must be one of global, tensor, got 'layer'"),
        ({"vote": "x"}, "aggregator.vote must be one of uniform, weighted, got 'x'"),
        ({"divisor": "x"}, "aggregator.divisor must be one of count, weight, weighted_count, got 'x'"),
        ({"scale": 0.0}, "aggregator.scale must be > 0, got 0.0"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ConfigError, match=message):
        Aggregator.by_name("ties")(**options)
