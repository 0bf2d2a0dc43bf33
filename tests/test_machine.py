"""What a process may use: a container's quota counts, not the host's cores."""

import os
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
