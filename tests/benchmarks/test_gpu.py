"""The script for paper scale, at a small shape: every stage runs and its figures fit together."""

import pytest
import torch

from benchmarks import gpu


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_every_stage_is_measured(device, tmp_path):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    words = ["--small", "--device", device, "--texts", "16", "--batch", "2", "--steps", "4", "--peak-tflops", "1"]
    results = gpu.main([*words, "--json", str(tmp_path / "gpu.json")])
    assert results["shape"] == "small"
    assert results["influence"]["tokens_per_s"] == pytest.approx(16 * 32 / results["influence"]["seconds"])
    step = results["lora step"]
    assert step["mfu"] == step["tflops"]  # of a peak of 1
    assert step["tokens_per_s"] == pytest.approx(2 * 16 / step["seconds"])
    merged = results["aggregation"]
    # two blocks, rank 4: q, k, v, o 4 * (64 + 64) and gate, up, down 3 * (64 + 160), times 4
    assert merged["parameters"] == 2 * 4 * (4 * 128 + 3 * 224)
    assert merged["fedavg_gb_per_s"] == pytest.approx(8 * 4 * merged["parameters"] / merged["fedavg_seconds"] / 1e9)
    assert results["plug-in"]["seconds"] > 0
    assert all(results[stage]["peak_gib"] > 0 for stage in ("influence", "lora step", "aggregation", "plug-in"))
    assert (tmp_path / "gpu.json").is_file()
