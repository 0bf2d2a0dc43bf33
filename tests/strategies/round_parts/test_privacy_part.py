"""What the part privacy takes from a server: options that a ledger can hold and a client can account for."""

import pytest

from fedproxy.errors import ConfigError
from fedproxy.strategies.round_parts import described, made
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
