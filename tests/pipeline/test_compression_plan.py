"""What `recipes plan` says of compressors, against proxies that were really made."""

import pytest

from fedproxy.config import load_config
from fedproxy.data.assets import resolve
from fedproxy.models import load_model
from fedproxy.models.decoder import parameter_count
from fedproxy.pipeline.plan import plan
from tests.strategies.compression.architectures import texts


@pytest.mark.parametrize(
    "words",
    [
        ["name=angular", "ratio=0.34"],
        ["name=uniform", "first=1", "last=1"],
        ["name=random", "keep=[0,5]"],
        ["name=ffn_width", "ratio=0.3"],
        ["name=ffn_width", "ratio=0.2", "ratio_of=parameters"],
        ["name=cluster", "share=true"],
    ],
)
def test_planned_parameters_are_those_of_the_proxy(words):
    arguments = ["recipe=fedproxy_tiny", *(f"compression.{word}" for word in words)]
    config = load_config(arguments)
    proxy, _ = config.compression.compress(load_model(resolve("asset:tiny-llama")), [texts()])
    predicted = plan(arguments)
    assert predicted.proxy_parameters == parameter_count(proxy)
    assert predicted.blocks == (proxy.config.num_hidden_layers, 6)


def test_shared_centres_train_as_much_as_as_many_blocks():
    shared = plan(
        ["recipe=fedproxy_tiny", "compression.name=cluster", "compression.share=true", "trainable.blocks=centres"]
    )
    plain = plan(["recipe=fedproxy_tiny", "compression.name=cluster"])
    assert shared.trainable_parameters == plain.trainable_parameters  # three of six blocks
    assert shared.blocks == (6, 6)


def test_memory_of_compression_is_the_targets_weights_and_one_batch():
    arguments = ["recipe=fedproxy_tiny", "compression.calibration.max_tokens=32"]
    predicted = plan(arguments)
    config = load_model(resolve("asset:tiny-llama")).config
    # 16 texts of 32 tokens; four hidden states and three inner ones, and three hidden states to compare, all float32
    batch = 16 * 32 * 4 * (7 * config.hidden_size + 3 * config.intermediate_size)
    assert predicted.activation_bytes == batch
    assert predicted.compression_bytes == 4 * predicted.target_parameters + batch
    assert "server, compression" in str(predicted)
    half = plan([*arguments, "target.dtype=bfloat16"])
    assert half.compression_bytes < predicted.compression_bytes
