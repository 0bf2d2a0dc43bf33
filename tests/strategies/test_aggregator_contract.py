"""One battery for every registered aggregator, found by name: what DESIGN promises of all of them."""

import dataclasses

import pytest
import torch

from fedproxy.errors import ClientError, ConfigError
from fedproxy.protocol import ClientUpdate
from fedproxy.strategies.aggregators import Aggregator, RoundContext

CLIENTS = 7  # bulyan with one hostile client needs 4 + 3
SHAPES = {"m.lora_A.weight": (2, 5), "m.lora_B.weight": (4, 2), "norm": (300,), "scale": ()}
NAMES = Aggregator.names()
LISTED = {
    *("fedavg", "task_arithmetic", "ties", "h_ties", "dare", "della", "breadcrumbs", "sce", "model_stock", "consensus"),
    *("pcgrad", "cagrad", "config", "mgda", "median", "trimmed_mean", "krum", "multi_krum", "bulyan"),
    *("geometric_median", "centered_clipping", "norm_bound", "ffa_lora", "rolora", "flora", "fedex_lora", "flexlora"),
    *("fedsa_lora", "fisher", "regmean", "none"),
}
MERGING = tuple(name for name in NAMES if Aggregator.by_name(name).aggregates)


def make_updates(clients=CLIENTS, dtype=torch.float32, factor=1.0):
    rng = torch.Generator().manual_seed(3)
    updates = []
    for k in range(clients):
        delta = {name: (torch.randn(shape, generator=rng) * factor).to(dtype) for name, shape in SHAPES.items()}
        inputs = torch.randn(9, 5, generator=rng)
        extras = {
            "fisher": {name: torch.rand(shape, generator=rng) for name, shape in SHAPES.items()},
            "gram": {"m.lora_A.weight": inputs.T @ inputs},
        }
        updates.append(ClientUpdate(f"c{k}", delta, num_examples=k + 1, num_tokens=9 - k, extras=extras))
    return updates


def make_context(dtype=torch.float32, **fields):
    rng = torch.Generator().manual_seed(4)
    state = {name: torch.randn(shape, generator=rng).to(dtype) for name, shape in SHAPES.items()}
    return RoundContext(state=state, **fields)


def aggregate(name, updates, context=None, **options):
    return Aggregator.by_name(name)(**options).aggregate(updates, None, context or make_context(updates_dtype(updates)))


def updates_dtype(updates):
    return updates[0].delta["scale"].dtype


def assert_same(left, right):
    assert set(left) == set(right)
    for name in left:
        assert torch.equal(left[name], right[name]), name


def test_the_registry_holds_what_the_issue_lists():
    assert set(NAMES) >= LISTED


@pytest.mark.parametrize("name", NAMES)
def test_every_rule_declares_itself(name):
    rule = Aggregator.by_name(name)
    assert rule.__doc__
    assert rule.reference
    assert rule.space in ("any", "factors", "product")
    assert dataclasses.is_dataclass(rule)
    assert rule().name == name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MERGING)
def test_shapes_and_dtypes_are_kept_and_inputs_untouched(name, dtype):
    updates = make_updates(dtype=dtype)
    result = aggregate(name, updates)
    assert {n: (t.shape, t.dtype) for n, t in result.delta.items()} == {n: (s, dtype) for n, s in SHAPES.items()}
    assert all(tensor.isfinite().all() for tensor in result.delta.values())
    for update, fresh in zip(updates, make_updates(dtype=dtype), strict=True):
        assert_same(update.delta, fresh.delta)
        for group in update.extras:
            assert_same(update.extras[group], fresh.extras[group])


@pytest.mark.parametrize("name", MERGING)
def test_client_order_does_not_matter(name):
    updates = make_updates()
    shuffled = [updates[i] for i in (3, 6, 0, 5, 1, 4, 2)]
    one, other = aggregate(name, updates), aggregate(name, shuffled)
    assert_same(one.delta, other.delta)
    assert one.diagnostics == other.diagnostics


@pytest.mark.parametrize("name", MERGING)
def test_file_backed_updates_give_the_same_bits(name, tmp_path):
    updates = make_updates()
    loaded = []
    for update in updates:
        path = tmp_path / f"{update.client_id}.safetensors"
        update.save(path)
        loaded.append(ClientUpdate.load(path))
    one, other = aggregate(name, updates), aggregate(name, loaded)
    assert_same(one.delta, other.delta)
    assert_same(one.base_change, other.base_change)
    assert one.diagnostics == other.diagnostics


@pytest.mark.parametrize("name", MERGING)
def test_tensors_with_a_gradient_give_the_same_bits(name):
    updates, context = make_updates(), make_context()
    tracked = [
        dataclasses.replace(update, delta={n: t.clone().requires_grad_() for n, t in update.delta.items()})
        for update in updates
    ]
    one, other = aggregate(name, updates, context), aggregate(name, tracked, context)
    assert_same(one.delta, other.delta)
    assert not any(tensor.requires_grad for tensor in other.delta.values())


def test_updates_without_tensors_are_refused():
    with pytest.raises(ClientError, match="aggregation needs at least one tensor, got updates without any"):
        Aggregator.by_name("fedavg")().aggregate([ClientUpdate("a", {})])


@pytest.mark.parametrize("name", MERGING)
def test_leaving_out_the_figures_changes_no_bit_and_still_checks(name):
    updates, context = make_updates(), make_context()
    rule = Aggregator.by_name(name)()
    bare = rule.aggregate(updates, None, context, figures=False)
    assert_same(bare.delta, rule.aggregate(updates, None, context).delta)
    updates[2].delta["norm"][7] = float("nan")
    with pytest.raises(ClientError, match="client 'c2': tensor 'norm' must be finite"):
        rule.aggregate(updates, None, context, figures=False)


NOT_HOMOGENEOUS = {"centered_clipping", "fedex_lora", "flexlora", "flora", "norm_bound"}
"""Rules with a bound of their own, or on products of factors: c times the updates give another multiple."""
CHANGES_SINGLE = NOT_HOMOGENEOUS | {
    *("breadcrumbs", "bulyan", "cagrad", "consensus", "dare", "della", "ffa_lora", "krum", "multi_krum", "rolora"),
    *("task_arithmetic", "ties"),
}
"""Rules that trim, scale or refuse the update of a single client."""


@pytest.mark.parametrize("name", [n for n in MERGING if n not in NOT_HOMOGENEOUS])
def test_four_times_the_updates_give_four_times_the_result(name):
    one, four = aggregate(name, make_updates()), aggregate(name, make_updates(factor=4.0))
    for tensor in one.delta:
        torch.testing.assert_close(four.delta[tensor], 4.0 * one.delta[tensor], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in CHANGES_SINGLE])
def test_one_client_is_returned_as_it_is(name):
    updates = make_updates(clients=1)
    result = aggregate(name, updates)
    for tensor, values in updates[0].delta.items():
        torch.testing.assert_close(result.delta[tensor], values, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", MERGING)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_name_client_and_tensor(name, bad):
    for tensor in ("m.lora_B.weight", "norm"):
        updates = make_updates()
        updates[4].delta[tensor].view(-1)[1] = bad
        with pytest.raises(ClientError, match=f"client 'c4': tensor '{tensor}' must be finite"):
            aggregate(name, updates)


@pytest.mark.parametrize("name", MERGING)
def test_zero_updates_give_a_zero_result(name):
    updates = make_updates(factor=0.0)
    if name in ("flexlora", "flora"):  # they re-factor the state itself: its product is what stays
        return
    for tensor, values in aggregate(name, updates).delta.items():
        assert float(values.abs().max()) < 1e-6, tensor


@pytest.mark.parametrize("name", ["dare", "della", "pcgrad"])
def test_random_rules_follow_the_seed_and_the_round(name):
    updates = make_updates()
    results = [
        aggregate(name, updates, make_context(seed=seed, round=number)).delta["norm"]
        for seed, number in ((1, 1), (1, 1), (2, 1), (1, 2))
    ]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[3])


@pytest.mark.parametrize("name", [n for n in NAMES if Aggregator.by_name(n).needs_extras])
def test_missing_statistics_are_named(name):
    updates = [dataclasses.replace(update, extras={}) for update in make_updates()]
    group = Aggregator.by_name(name).needs_extras[0]
    with pytest.raises(ClientError, match=rf"client 'c0' must send extras\['{group}'\] for aggregator '{name}'"):
        aggregate(name, updates)


@pytest.mark.parametrize("name", [n for n in NAMES if Aggregator.by_name(n).space == "product"])
def test_product_rules_ask_for_the_state(name):
    with pytest.raises(ConfigError, match=f"'{name}' needs the broadcast state, got none"):
        Aggregator.by_name(name)().aggregate(make_updates())


@pytest.mark.parametrize("name", MERGING)
def test_figures_are_those_of_the_report(name):
    known = {"heterogeneity", "weights", "retention", "conflict_mean", "cosine", "sign_agreement", "kept_density"}
    result = aggregate(name, make_updates())
    assert set(result.diagnostics) <= known | {"update_norms"}
    assert len(result.diagnostics["update_norms"]) == CLIENTS
    assert result.conflict is not None
    assert {n: t.shape for n, t in result.conflict.items()} == {n: torch.Size(s) for n, s in SHAPES.items()}


def test_rules_without_weights_refuse_weighting():
    takes = {name for name in NAMES if "weighting" in {f.name for f in dataclasses.fields(Aggregator.by_name(name))}}
    linear = {name for name in NAMES if Aggregator.by_name(name).linear} - {"task_arithmetic"}
    assert takes == linear | {"geometric_median", "flora", "flexlora", "fedex_lora"}
