"""The plan against a run on SmolLM2: bytes to the byte, memory of server and client within 20 %."""

import sys

import pytest

from benchmarks import plan_check


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak of resident memory from /proc")
def test_memory_is_within_a_fifth_and_bytes_are_exact():
    figures = plan_check.main([])
    assert all(direction for line in figures["bytes"] for direction in line.values())
    assert all(abs(role["error"]) <= 0.2 for role in figures["memory"].values())
