"""What a process may use: a container's quota counts, not the host's cores."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from fedproxy import machine
from fedproxy.modules import devices


@pytest.fixture
def group(tmp_path, monkeypatch):
    """A control group's folder, empty; the process is bound to eight cores."""
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("200000 100000", 2),
        ("150000 100000", 2),
        ("10000 100000", 1),
        ("max 100000", 8),
        ("1600000 100000", 8),
        ("", 8),
    ],
)
def test_the_quota_of_a_control_group_counts(group, text, expected):
    (group / "cpu.max").write_text(text)
    assert machine.cores() == expected


@pytest.mark.parametrize(("quota", "expected"), [("300000", 3), ("-1", 8)])
def test_version_1_of_control_groups_counts_too(group, quota, expected):
    (group / "cpu").mkdir()
    (group / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (group / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert machine.cores() == expected


def test_a_container_has_the_memory_that_it_is_allowed(group):
    whole = machine.memory_bytes()
    (group / "memory.max").write_text("max\n")
    assert machine.memory_bytes() == whole
    (group / "memory.max").write_text("1048576\n")
    assert machine.memory_bytes() == 1 << 20


@pytest.mark.parametrize(
    ("line", "expected"),
    [("flags : fpu avx512_bf16 sse", True), ("flags : fpu sse", False), ("Features : fp bf16", True), ("x : y", None)],
)
def test_bfloat16_units_are_what_the_processor_says(monkeypatch, line, expected):
    monkeypatch.setattr(machine, "_text", lambda _: line)
    assert machine.bfloat16_units() is expected


def test_pytorch_uses_no_more_threads_than_cores_unless_told(monkeypatch):
    before = torch.get_num_threads()
    told = SimpleNamespace(threads=4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: told.threads)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: setattr(told, "threads", count))
    monkeypatch.setattr(devices, "cores", lambda: 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    devices.keep_to_cores()
    assert told.threads == 4
    monkeypatch.delenv("OMP_NUM_THREADS")
    devices.keep_to_cores()
    assert told.threads == 2
    monkeypatch.undo()
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"GOMP_SPINCOUNT": "1000"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
    ],
)
def test_threads_wait_asleep_unless_somebody_says_how(monkeypatch, given, expected):
    monkeypatch.setattr(os, "environ", dict(given))
    machine.wait_asleep()
    assert os.environ == expected


def test_a_command_sets_it_before_torch_reads_it():
    """What OpenMP says of itself where torch is imported; other builds than PyTorch's may have no libgomp."""
    code = (
        "import sys\nfrom fedproxy.command import run_command\nassert 'torch' not in sys.modules\n"
        "run_command(lambda words: __import__('torch') and 0, 'usage')"
    )
    kept = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env={**kept, "OMP_DISPLAY_ENV": "verbose"}, capture_output=True, text=True, check=True
    )
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("torch is not built with libgomp")
    assert "GOMP_SPINCOUNT = '1000'" in done.stderr
