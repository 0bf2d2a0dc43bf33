"""The script behind the server's figures of memory runs on the tiny model."""

import json
import shutil
import sys

import pytest

from benchmarks import server_memory
from fedproxy.data.assets import resolve

TINY = ["recipe=fedproxy_tiny", "target.dtype=float32", "data.tasks=[tiny_colors]", "evaluation.limit=2"]
CALIBRATION = "compression.calibration={path: 'asset:tiny-calibration', rows: 4}"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads resident memory from /proc")
def test_every_stage_has_a_measured_and_a_predicted_peak(monkeypatch, tmp_path):
    monkeypatch.setattr(
        server_memory, "write_target", lambda folder: shutil.copytree(resolve("asset:tiny-llama"), folder) and 1
    )
    file = tmp_path / "memory.json"
    figures = server_memory.main([*TINY, CALIBRATION, f"file={file}"])
    assert json.loads(file.read_text()) == figures
    for stage in ("compression", "federation", "fusion and evaluation"):
        assert figures[stage]["measured_gb"] > 0.2 < figures[stage]["predicted_gb"]
