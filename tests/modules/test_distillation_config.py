import pytest

from fedproxy.errors import ConfigError
from fedproxy.modules.distillation_config import DistillationConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -1}, r"distillation\.steps must be at least 0, got -1"),
        ({"steps": 1, "lr": 0.0}, r"distillation\.lr must be positive, got 0"),
        ({"steps": 1, "temperature": 0.0}, r"distillation\.temperature must be positive"),
        ({"steps": 1, "kl_weight": -1.0}, r"distillation\.kl_weight must be at least 0, got -1"),
        ({"steps": 1, "kl_weight": 0.0}, r"distillation\.kl_weight must be positive if hidden_weight is 0, got 0"),
        ({"steps": 1, "top_k": 0}, r"distillation\.top_k must be at least 1, got 0"),
        ({"steps": 1, "lora_r": 0}, r"distillation\.lora_r must be at least 1, got 0"),
        ({"steps": 1, "cache_gib": 0.0}, r"distillation\.cache_gib must be positive"),
        ({"lr": 1e-3}, r"distillation\.steps must be at least 1 where distillation\.lr is set, got 0; set"),
    ],
)
def test_numbers_out_of_range(options, message):
    with pytest.raises(ConfigError, match=message):
        DistillationConfig(**options)


def test_off_by_default():
    assert DistillationConfig().steps == 0
    assert DistillationConfig(steps=1, kl_weight=0.0, hidden_weight=1.0).hidden_weight == 1.0
