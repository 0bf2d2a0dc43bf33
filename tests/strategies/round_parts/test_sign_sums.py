"""TIES from sums over clients: the rule itself, from what a secure sum of its clients' parts gives."""

from dataclasses import replace

import pytest
import torch

from fedproxy.privacy.secure_sum import added, decode, encode
from fedproxy.protocol import ClientUpdate
from fedproxy.strategies.aggregators import Aggregator
from fedproxy.strategies.functional.voting import Sums, ties_of_sums
from fedproxy.strategies.round_parts import Group
from fedproxy.strategies.round_parts.sign_sums import MOST_CLIENTS, SignSums


def updates(count, size=400, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [
        ClientUpdate(
            f"client {k:04d}",
            {"b": 0.1 * torch.randn(size // 20, 20, generator=generator), "a": torch.randn(7, generator=generator)},
        )
        for k in range(count)
    ]


def summed(sent, largest):
    """What the server has of the clients' parts: sums in fixed point, and the mean of the updates."""
    flat = [
        {**{f"delta/{name}": update.delta[name] for name in update.delta}, **update.extras["sign_sums"]}
        for update in sent
    ]
    total = decode(added([encode(one, largest, len(sent)) for one in flat]), largest, len(sent))
    delta = {name.removeprefix("delta/"): t / len(sent) for name, t in total.items() if name.startswith("delta/")}
    beside = {name: tensor for name, tensor in total.items() if not name.startswith("delta/")}
    return ClientUpdate("the sum", delta, num_examples=len(sent), extras={"sign_sums": beside})


@pytest.mark.parametrize("largest", [5.3, 8.0])
@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("clients", [2, 5, 300])
def test_sums_give_what_the_rule_gives_in_the_clear(clients, scope, largest):
    rule = Aggregator.by_name("ties")(density=0.3, trim_scope=scope, scale=0.7)
    part, known = SignSums(0.3, scope, largest), updates(clients)
    clear = rule.aggregate(known).delta
    found = rule.merge_sums(part.sums(summed([part.reply(None, update) for update in known], largest))).delta
    for name, tensor in clear.items():
        assert found[name].shape == tensor.shape
        # Sums are wrong by clients / 2 steps of 2 * clients * largest / 2^31 at most, and float32 rounds both sides.
        bound = clients * largest * 2**-30 + 1e-6 * float(tensor.abs().max())
        assert float((found[name] - tensor).abs().max()) <= bound


def test_signs_that_tie_take_that_of_the_majority():
    # Coordinates 2 and 3 elect +, 4 elects -: the tie in 0 takes +, so 0.5; where nobody moved there is nothing.
    one, other = (
        ClientUpdate(name, {"w": torch.tensor(own)})
        for name, own in (("a", [0.5, 0.0, 1.0, 0.5, -0.5]), ("b", [-0.5, 0.0, 0.5, 0.25, -1.0]))
    )
    rule, part = Aggregator.by_name("ties")(density=1.0), SignSums()
    found = rule.merge_sums(part.sums(summed([part.reply(None, update) for update in (one, other)], 1.0))).delta["w"]
    assert found.tolist() == rule.aggregate([one, other]).delta["w"].tolist() == [0.5, 0.0, 0.75, 0.375, -0.75]


def test_signs_of_as_many_clients_as_there_may_be_are_counted_exactly():
    part = SignSums(largest=3.0)
    up, down = (part.reply(None, ClientUpdate("a", {"w": torch.tensor([sign * 0.25])})) for sign in (1.0, -1.0))
    for positive in (0, MOST_CLIENTS // 2, MOST_CLIENTS):
        sent = [up] * positive + [down] * (MOST_CLIENTS - positive)
        own = part.sums(summed(sent, 3.0))["w"]
        assert (float(own.positive), float(own.negative)) == (positive, MOST_CLIENTS - positive)


def test_a_tie_of_all_signs_gives_nothing():
    half = torch.tensor([1.0])
    assert float(ties_of_sums({"w": Sums(torch.zeros(1), half, half, half)})["w"]) == 0.0


def test_the_server_knows_the_form_of_what_comes():
    forms = {"w": torch.empty(3, 2, device="meta")}
    sent = SignSums().reply(None, ClientUpdate("a", {"w": torch.ones(3, 2)}))
    expected = SignSums().expects({"delta": Group(forms)}, None)["sign_sums"].tensors
    assert {name: tensor.shape for name, tensor in sent.extras["sign_sums"].items()} == {
        name: tensor.shape for name, tensor in expected.items()
    }
    assert replace(sent, extras={}).delta.keys() == forms.keys()
