"""Impossible combinations end in one line before anything is loaded."""

import pytest

from fedproxy.errors import ConfigError
from fedproxy.strategies.aggregators import Aggregator
from fedproxy.strategies.capabilities import check_capabilities
from fedproxy.strategies.regularizers import Regularizer
from fedproxy.strategies.round_parts.clip_noise import ClipNoise
from fedproxy.strategies.round_parts.precision import Precision
from fedproxy.strategies.round_parts.ranks import Ranks
from fedproxy.strategies.server_optimizers import ServerOptimizer


def check(aggregator="fedavg", regularizer="none", server_optimizer="none", options=None, **facts):
    check_capabilities(
        Aggregator.by_name(aggregator)(**(options or {})),
        Regularizer.by_name(regularizer)(),
        ServerOptimizer.by_name(server_optimizer)(),
        **{"clients_per_round": 8, **facts},
    )


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"aggregator": "h_ties", "regularizer": "conflict"},
        {"aggregator": "fedavg", "secure_aggregation": True},
        {"aggregator": "ties", "secure_aggregation": True},
        {"aggregator": "flexlora", "space": "product", "parts": [Ranks({"a": 4})]},
        {"aggregator": "h_ties", "space": "product", "parts": [Ranks({"a": 4})]},
        {"aggregator": "h_ties", "regularizer": "conflict", "parts": [Ranks({"a": 4}, pad=True)]},
        {"aggregator": "h_ties", "parts": [ClipNoise(), Precision(up="int8")]},
        {"aggregator": "config", "space": "product"},
        {"aggregator": "none"},
        {"aggregator": "none", "space": "product"},
        {"regularizer": "feddyn", "server_optimizer": "feddyn", "options": {"weighting": "uniform"}},
        {"regularizer": "scaffold", "server_optimizer": "sgd"},
        {"aggregator": "fisher", "client_statistics": ["fisher"]},
        {"aggregator": "krum", "clients_per_round": 5},
        {"aggregator": "fedex_lora", "space": "product"},
        {"aggregator": "fedsa_lora", "server_optimizer": "adam"},
        {"aggregator": "median", "regularizer": "feddyn", "server_optimizer": "feddyn", "share": 1.0},
    ],
)
def test_what_goes_together_passes(facts):
    check(**facts)


def test_both_halves_of_feddyn_must_agree_on_alpha():
    halves = Regularizer.by_name("feddyn")(strength=0.1), ServerOptimizer.by_name("feddyn")(strength=0.2)
    with pytest.raises(ConfigError, match=r"server_optimizer.strength: .* 0.1, got 0.2; set server_optimizer.strength"):
        check_capabilities(Aggregator.by_name("fedavg")(), *halves, clients_per_round=8)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"aggregator": "krum", "secure_aggregation": True}, r"'krum' needs each client's update .* use one of fedavg"),
        (
            {"aggregator": "ties", "options": {"vote": "weighted"}, "secure_aggregation": True},
            "'ties' needs each client's update with these options",
        ),
        (
            {"regularizer": "conflict", "secure_aggregation": True},
            "regularizer.name: 'conflict' needs the signs of each client's update, which secure aggregation hides",
        ),
        (
            {"parts": [Ranks({"a": 4})]},
            r"'fedavg' needs updates of one rank; use parts.ranks.pad=true, .* flexlora, flora",
        ),
        ({"parts": [Ranks(memory_gib={"a": 4.0})]}, r"'fedavg' needs updates of one rank; use parts.ranks.pad=true"),
        (
            {"aggregator": "fedex_lora", "space": "product", "parts": [Ranks({"a": 4})]},
            r"'fedex_lora' needs updates of one rank",
        ),
        (
            {"aggregator": "flora", "space": "product", "regularizer": "conflict", "parts": [Ranks({"a": 4})]},
            r"parts.ranks: conflict compares coordinates of all clients",
        ),
        ({"aggregator": "none", "parts": [Precision()]}, r"parts.precision: aggregator 'none' merges no clients"),
        (
            {"regularizer": "scaffold", "parts": [ClipNoise()]},
            r"parts.clip_noise bounds the update alone, and control_variates of",
        ),
        ({"aggregator": "ffa_lora", "space": "product"}, "'ffa_lora' is defined in factors space, got 'product'"),
        ({"aggregator": "flexlora"}, "'flexlora' is defined in product space, got 'factors'"),
        ({"space": "tangent"}, "federation.space must be one of factors, product, got 'tangent'"),
        ({"aggregator": "krum", "clients_per_round": 4}, "'krum' needs at least 5 clients a round .* got 4"),
        (
            {"aggregator": "sce", "options": {"density": 0.5}, "clients_per_round": 1},
            "'sce' needs at least 2 clients a round .* got 1",
        ),
        ({"aggregator": "bulyan", "options": {"byzantine": 2}}, "'bulyan' needs at least 11 clients a round .* got 8"),
        ({"aggregator": "regmean"}, "'regmean' needs clients that send 'gram' statistics"),
        ({"aggregator": "none", "regularizer": "conflict"}, "'conflict' needs the conflict between clients"),
        ({"regularizer": "feddyn"}, "'feddyn' and server optimizer 'none' do not go together"),
        ({"server_optimizer": "feddyn"}, "regularizer 'none' and server optimizer 'feddyn' do not go together"),
        (
            {"regularizer": "feddyn", "server_optimizer": "feddyn", "share": 0.25},
            "server_optimizer.share: 'feddyn' must have the share of the clients' half, 0.25, got 1; set",
        ),
        (
            {"regularizer": "feddyn", "server_optimizer": "feddyn"},  # the default weighs by examples
            "aggregator.weighting: .* all must weigh alike, got 'examples'; set aggregator.weighting=uniform",
        ),
        (
            {"aggregator": "flora", "space": "product", "server_optimizer": "sgd"},
            "server_optimizer.name: aggregator 'flora' merges products and makes LoRA's factors anew, .*, got 'sgd'",
        ),
        ({"space": "product", "server_optimizer": "adam"}, "aggregator 'fedavg' merges products"),
        (
            {"aggregator": "fedsa_lora", "regularizer": "scaffold"},
            "regularizer.name: 'scaffold' corrects clients towards a state that all share, and aggregator 'fedsa_lora'",
        ),
        (
            {"aggregator": "none", "regularizer": "feddyn", "server_optimizer": "feddyn"},
            "'feddyn' corrects clients towards a state that all share",
        ),
        (
            {"regularizer": "scaffold", "space": "product"},
            "'scaffold' remembers LoRA factors, which federation.space=product makes anew every round",
        ),
        (
            {"aggregator": "fisher", "space": "product", "client_statistics": ["fisher"]},
            "'fisher' is defined in factors space, got 'product'",
        ),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(facts, message):
    with pytest.raises(ConfigError, match=message) as caught:
        check(**facts)
    assert "\n" not in str(caught.value)


def test_a_rule_that_leaves_clients_tensors_must_have_weights_for_their_mean():
    class Halves(Aggregator, name="halves_without_weights"):
        parts = ("personal",)

        def shares(self, name):
            return not name.endswith("lora_B.weight")

    with pytest.raises(ConfigError, match=r"aggregator.name: 'halves_without_weights' leaves clients tensors .*; use"):
        check("halves_without_weights")
    check("fedsa_lora")
