import pytest

from fedproxy.errors import ConfigError
from fedproxy.pipeline.planning.hardware import Hardware


def test_words_of_the_plan_are_taken_out_of_the_recipe_s():
    hardware, rest = Hardware.split(["recipe=x", "plan.devices=8", "plan.client_mbps=null", "federation.rounds=2"])
    assert (hardware.devices, hardware.client_mbps, hardware.server_mbps) == (8, None, 1000.0)
    assert rest == ["recipe=x", "federation.rounds=2"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("plan.device=8", r"plan.device: unknown key; did you mean 'devices'\?"),
        ("plan.devices", r"'plan.devices' is not a key=value argument"),
        ("plan.devices=0", r"plan.devices must be positive, got 0"),
        ("plan.devices=many", r"plan.devices must be a whole number, or null, got 'many'"),
        ("plan.tflops=fast", r"plan.tflops must be a positive number or measure, got 'fast'"),
        ("plan.client_mbps=-1", r"plan.client_mbps must be positive, got -1"),
    ],
)
def test_a_wrong_word_is_one_line(word, message):
    with pytest.raises(ConfigError, match=message):
        Hardware.split([word])
