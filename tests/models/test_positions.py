"""How many tokens a model has positions for, whatever its family calls them."""

import pytest
from transformers import AutoConfig

from fedproxy.models.positions import positions


@pytest.mark.parametrize(
    ("family", "options", "expected"),
    [
        ("llama", {"max_position_embeddings": 64}, 64),
        ("gpt2", {"n_positions": 32}, 32),
        ("opt", {"max_position_embeddings": 48}, 48),
        ("gpt_neo", {"max_position_embeddings": 48, "window_size": 8}, 48),
        ("mistral", {"max_position_embeddings": 64, "sliding_window": 16}, 64),  # a window is not a bound
        ("mpt", {"max_seq_len": 40}, 40),
        ("roberta", {"max_position_embeddings": 66, "pad_token_id": 1}, 64),  # positions begin behind padding's
        ("bloom", {}, None),
        ("mamba", {}, None),
        # stretched rotary positions reach as far as they are stretched
        ("qwen2", {"max_position_embeddings": 64, "rope_parameters": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}}, 256),
        ("llama", {"max_position_embeddings": 128, "rope_parameters": {
            "rope_type": "llama3", "factor": 2.0, "original_max_position_embeddings": 32, "rope_theta": 1e4,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0}}, 128),
        ("llama", {"max_position_embeddings": 64, "rope_parameters": {
            "rope_type": "linear", "factor": float("inf"), "rope_theta": 1e4}}, 64),  # no such stretch
    ],
)  # fmt: skip
def test_positions(family, options, expected):
    assert positions(AutoConfig.for_model(family, **options)) == expected


def test_positions_of_the_text_part_of_a_composite_model():
    config = AutoConfig.for_model("gemma3", text_config={"max_position_embeddings": 96})
    assert positions(config) == 96
