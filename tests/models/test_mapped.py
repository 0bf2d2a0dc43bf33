"""Memory of mapped weights comes back, and no value is lost by it."""

import platform
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fedproxy.models import mapped

SIZE = 24 * 2**20
"""Numbers of the weight: 96 MiB, above what :func:`release` lets be."""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is given back on Linux alone")


@pytest.fixture
def weight(tmp_path):
    save_file({"weight": torch.arange(SIZE, dtype=torch.float32)}, tmp_path / "model.safetensors")
    mapped._Seen.file_bytes = mapped._file_bytes()
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        return file.get_tensor("weight")


def file_bytes(field="RssFile"):
    """Bytes of files in this process's memory, as /proc/self/status says."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def test_memory_is_given_back_and_values_stay(weight):
    before, total = file_bytes(), weight.sum(dtype=torch.float64)
    assert file_bytes() - before > 0.9 * 4 * SIZE  # it is mapped, and was read
    mapped.release()
    assert file_bytes() - before < 0.1 * 4 * SIZE
    assert torch.equal(weight.sum(dtype=torch.float64), total)


def test_a_file_that_was_written_into_stays_in_memory(weight):
    weight[5], before = -1.0, file_bytes()
    weight.sum()
    mapped.release()
    assert weight[5] == -1.0
    assert weight[6] == 6.0
    assert file_bytes() - before > 0.9 * 4 * SIZE


def test_a_deleted_file_can_be_given_back_too(weight, tmp_path):
    (tmp_path / "model.safetensors").unlink()
    before, total = file_bytes(), weight.sum(dtype=torch.float64)
    mapped.release()
    assert file_bytes() - before < 0.1 * 4 * SIZE
    assert torch.equal(weight.sum(dtype=torch.float64), total)


def test_little_memory_is_not_looked_for(weight, monkeypatch):
    monkeypatch.setattr(mapped, "_untouched", lambda: pytest.fail("no file came into memory"))
    mapped.release()
    weight.sum()
    with pytest.raises(pytest.fail.Exception):
        mapped.release()


def test_other_systems_keep_all(weight, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    before = file_bytes()
    weight.sum()
    mapped.release()
    assert file_bytes() - before > 0.9 * 4 * SIZE


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc")
def test_freed_memory_below_memory_in_use_comes_back():
    freed = [torch.ones(2**14) for _ in range(4096)]  # 64 KiB each: in the heap, not in mappings of their own
    above = torch.ones(2**12)
    before = file_bytes("RssAnon")
    freed.clear()
    mapped.trim()
    assert before - file_bytes("RssAnon") > 128 * 2**20
    assert above.sum() == 2**12
