"""The chain of round parts: who names which, what each sends, keeps and expects."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from fedproxy.errors import ClientError, ConfigError
from fedproxy.protocol import Broadcast, ClientUpdate
from fedproxy.strategies.aggregators import Aggregation, Aggregator
from fedproxy.strategies.realignment import Realignment
from fedproxy.strategies.regularizers import Regularizer
from fedproxy.strategies.round_parts import RoundPart, RoundResult, Rules, described, made, parts_of
from fedproxy.strategies.round_parts.base_change import BaseChange
from fedproxy.strategies.round_parts.conflict_map import ConflictMap
from fedproxy.strategies.round_parts.control_variates import ControlVariates
from fedproxy.strategies.round_parts.personal import Personal
from fedproxy.strategies.trainable import Trainable

ONE = {"x": torch.ones(1)}


def rules(make_model, aggregator="fedavg", regularizer="none"):
    model = Trainable.by_name("lora")(r=2, modules=["q_proj"]).attach(make_model("llama"))
    chosen = Aggregator.by_name(aggregator)(), Regularizer.by_name(regularizer)(), Realignment.by_name("none")()
    return Rules(*chosen, model)


def result(updates=(), broadcast=None, **aggregation):
    return RoundResult(1, 8, broadcast or Broadcast(1, {}), updates, Aggregation({}, **aggregation))


@pytest.mark.parametrize(
    ("aggregator", "regularizer", "names"),
    [
        ("fedavg", "none", []),
        ("h_ties", "conflict", ["conflict"]),
        ("fedavg", "scaffold", ["control_variates"]),
        ("fedavg", "feddyn", ["control_variates"]),
        ("flora", "conflict", ["conflict", "base_change"]),
        ("fisher", "none", ["statistics"]),
        ("fedsa_lora", "conflict", ["personal", "conflict"]),
    ],
)
def test_rules_name_their_parts(make_model, aggregator, regularizer, names):
    assert [part.name for part in parts_of(rules(make_model, aggregator, regularizer))] == names


@pytest.mark.parametrize("aggregator", ["fedsa_lora", "fisher", "flora"])
@pytest.mark.parametrize("regularizer", ["scaffold", "conflict", "proximal"])
def test_a_part_is_the_same_at_the_client(make_model, aggregator, regularizer):
    for part in parts_of(rules(make_model, aggregator, regularizer)):
        there = made(described(part))
        assert (there.name, described(there)) == (part.name, described(part))


def test_a_rule_with_tensors_of_the_clients_own_must_name_the_part(make_model):
    @dataclass(frozen=True)
    class Keeps(Aggregator, name="keeps_b"):
        reference: ClassVar[str] = "a test"

        def shares(self, name):
            return "lora_B" not in name

    with pytest.raises(ConfigError, match=r"'keeps_b' leaves clients tensors of their own .* round part 'personal'"):
        parts_of(rules(make_model, "keeps_b"))


def test_the_conflict_map_goes_with_the_next_broadcast():
    part = ConflictMap()
    assert part.send(Broadcast(1, {}), {}).extras == {}
    kept = part.collect({}, result(conflict=ONE))
    assert part.send(Broadcast(2, {}), kept).extras == {"conflict": ONE}


def test_a_base_change_goes_with_every_broadcast_but_the_first():
    part = BaseChange()
    assert part.send(Broadcast(1, {}), {}).extras == {}
    assert part.send(Broadcast(2, {}), {}).extras == {"base_change": {}}
    assert part.collect({}, result(base_change=ONE)) == ONE


def test_scaffolds_server_half_gains_the_changes_over_all_clients():
    updates = [ClientUpdate(f"c{k}", {}, extras={"control_variates": {"x": torch.tensor([2.0 * k])}}) for k in (1, 2)]
    # c + (2 + 4) / 8 clients
    part = ControlVariates({"name": "scaffold"})
    assert part.collect({"x": torch.tensor([1.0])}, result(updates))["x"].tolist() == [1.75]
    assert ControlVariates({"name": "feddyn"}).collect({}, result(updates)) == {}


def test_an_update_without_the_clients_half_is_an_error():
    with pytest.raises(ClientError, match=r"client 'c0' must send extras\['control_variates'\] .*'scaffold', got \[\]"):
        ControlVariates({"name": "scaffold"}).collect({}, result([ClientUpdate("c0", {})]))


def test_personal_tensors_are_those_that_a_rule_does_not_share(make_model):
    given = rules(make_model, "fedsa_lora")
    part = Personal.of(given)
    assert part.tensors == tuple(name for name in given.model.parameters() if "lora_B" in name)
    sent = part.send(Broadcast(1, given.model.state()), {})
    assert sorted(sent.state) == sorted(name for name in given.model.parameters() if "lora_A" in name)


def test_every_part_has_its_own_place():
    places = [RoundPart.by_name(name).order for name in RoundPart.names()]
    assert len(set(places)) == len(places)
