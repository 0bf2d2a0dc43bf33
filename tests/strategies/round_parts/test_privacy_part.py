"""What the part privacy takes from a server: options that a ledger can hold and a client can account for."""

from dataclasses import replace

import pytest
import torch

from fedproxy.errors import ClientError, ConfigError
from fedproxy.federation.server.checkpoint import CheckpointFolder, Progress
from fedproxy.federation.server.expected import Expected
from fedproxy.federation.server.update_checks import check_update, too_long
from fedproxy.privacy.accounting import Release
from fedproxy.privacy.ledger import Charge
from fedproxy.protocol import Broadcast, ClientUpdate
from fedproxy.strategies.aggregators import Aggregation
from fedproxy.strategies.round_parts import RoundResult, described, made
from fedproxy.strategies.round_parts.clip_noise import norm
from fedproxy.strategies.round_parts.precision import decoded, encoded
from fedproxy.strategies.round_parts.privacy import Privacy

NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"run": 5}, "run"),
        ({"run": "x" * 1000}, "run"),
        ({"unit": "none"}, "unit"),
        ({"accountant": "mine"}, "accountant"),
        ({"noise_at": "home"}, "noise_at"),
        ({"rounds": 0}, "rounds"),
        ({"rounds": "9"}, "rounds"),
        ({"epsilon": NAN}, "epsilon"),
        ({"epsilon": True}, "epsilon"),
        ({"epsilon": 1e300}, "epsilon"),
        ({"noise_multiplier": 1e300}, "noise_multiplier"),
        ({"delta": INFINITE}, "delta"),
        ({"noise_multiplier": -3.0}, "noise_multiplier"),
        ({"noise_multiplier": "much"}, "noise_multiplier"),
        ({"clip": INFINITE}, "clip"),
        ({"quantile": 1.0}, "quantile"),
        ({"quantile": "half"}, "quantile"),
        ({"unit": "example", "quantile": 0.5}, "quantile"),
        ({"clip": 0}, "clip"),
        ({"sampling": "odd"}, "sampling"),
        ({"sampling": "without_replacement", "drawn": 1, "among": 9}, "sampling"),
        ({"sampling": "without_replacement", "noise_at": "server", "drawn": 1}, "drawn"),
    ],
)
def test_options_that_no_ledger_can_hold_are_refused(options, key):
    with pytest.raises(ConfigError, match=rf"parts.privacy.{key} must be "):
        made({"name": "privacy", **options})


def test_what_a_server_says_in_earnest_is_taken():
    told = Privacy(unit="client", epsilon=8, delta=1e-5, clip=0.1, run="ab" * 32, rounds=3)
    assert made(described(told)) == told
    secret = Privacy(sampling="without_replacement", noise_at="server", drawn=2, among=9, noise_multiplier=1)
    assert made(described(secret)) == secret


@pytest.mark.parametrize("value", [NAN, INFINITE])
def test_an_update_that_is_not_finite_leaves_a_client_as_zero_under_its_noise(value):
    """Where it is not finite is data, too, and no noise would hide it."""
    charge = Charge(Release(1.0), 1.0, 0, b"k" * 32, "", 1)
    part = Privacy(noise_multiplier=1.0, clip=0.5, quantile=0.5)
    sent, told = part._hidden({"w": torch.tensor([1.0, value, 2.0])}, charge)
    zero, _ = part._hidden({"w": torch.zeros(3)}, charge)
    assert torch.equal(sent["w"], zero["w"])
    assert bool(sent["w"].any())
    _, long = part._hidden({"w": torch.ones(3)}, charge)  # longer than the clip
    assert torch.equal(told["within"], long["within"])


@pytest.mark.parametrize("quantile", [None, 0.5])
def test_what_rounding_on_the_wire_made_longer_is_cut_again_before_noise_at_the_server(quantile):
    draw = torch.Generator().manual_seed(1)
    cut = {"w": (delta := torch.randn(6400, generator=draw)) / torch.linalg.vector_norm(delta)}
    rounded = decoded(*encoded(cut, "int8"))
    assert norm(rounded) > 1.00001
    told = {"release": torch.zeros(4), "within": torch.tensor(0.5), "clip": torch.tensor(1.0, dtype=torch.float64)}
    update = ClientUpdate("a", rounded, round=1, extras={"privacy": told})
    part = Privacy(noise_at="server", noise_multiplier=1e-9, least=1, quantile=quantile, test_seed=7)
    (merged,) = part.gather([update])
    assert norm(merged.delta) == pytest.approx(1.0, abs=1e-6)


def test_a_client_of_many_rows_is_not_dropped_for_the_steps_that_it_tells():
    """16 rows are one step of 16, and 20,000 are 1250: figures of a release, whose ratio says nothing of an update."""
    forms = Privacy(unit="example").expects({}, None)
    expected, sent = Expected(delta={}, extras=forms, withheld=True), Broadcast(1, {})

    def norms(steps):
        release = torch.tensor([1.0, 0.5, steps, 3.0], dtype=torch.float64)
        extras = {"privacy": {"release": release}}
        return check_update(ClientUpdate("a", {"w": torch.ones(4)}, round=1, extras=extras), sent, expected)

    found = {"small": norms(1.0), "other": norms(1.0), "large": norms(1250.0)}
    assert found["large"] == {"": 2.0}
    assert not any(too_long({client: own[part] for client, own in found.items()}, 10, part) for part in found["large"])
    with pytest.raises(ClientError, match=r"extras\['privacy'\] tensor 'release' must be finite"):
        norms(NAN)


@pytest.mark.parametrize("name", ["__metadata__", "clip"])
def test_what_a_client_of_any_name_released_is_in_a_checkpoint_that_can_be_read(name, tmp_path):
    """At real sites clients' names are their sites' own, and safetensors has a use for one of them."""
    release = torch.tensor([1.0, 1.0, 1.0, 3.0], dtype=torch.float64)
    told = {"release": release, "within": torch.tensor(0.5), "clip": torch.tensor(1.0, dtype=torch.float64)}
    update = ClientUpdate(name, {}, round=1, extras={"privacy": told})
    part = Privacy(noise_multiplier=1.0, quantile=0.5)
    result = RoundResult(1, 1, Broadcast(1, {}), [update], Aggregation({}), received=[update])
    folder = CheckpointFolder(tmp_path)
    folder.save(Progress(1, {}, {"privacy": part.collect({}, result)}))
    memory = folder.load(1).remembered("privacy")
    part.verify(update, memory)
    quieter = replace(update, extras={"privacy": {**told, "release": release / 2}})
    with pytest.raises(ClientError, match=r"it added noise 0.5, and 1 before"):
        part.verify(quieter, memory)
    sent = part.send(Broadcast(2, {}, {"parts": [{"name": "privacy", "clip": 1.0}]}), memory)
    assert sent.job["parts"][0]["clip"] == pytest.approx(0.9048, abs=1e-3)  # exp(-0.2 (1 - 0.5))
