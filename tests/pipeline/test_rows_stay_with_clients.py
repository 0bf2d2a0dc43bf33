"""After rows are dealt out the main process opens no client's file, at the start of a run and when it goes on."""

import builtins
import io
import os

import pytest

from fedproxy.config import load_config
from fedproxy.data.partition.rows import rows_file
from fedproxy.names import file_stem
from fedproxy.pipeline.run import compress_only

from .conftest import SMALL

# All that asks which texts are a client's: calibration, healing, distillation, re-alignment, fusion's judge,
# validation.
ASKING = (
    "healing.rows=8",
    "distillation.steps=1",
    "distillation.rows=8",
    "trainable.blocks=last",
    "trainable.last=1",
    "realignment.name=emulator",
    "realignment.steps=1",
    "realignment.rows=8",
    "federation.validation.every=1",
    "federation.validation.rows=4",
    "federation.sampling=weighted",
    "fusion={name: task_vector, candidates: [0.5, 1.0]}",
    "evaluation.models=[]",
)


@pytest.fixture
def read(monkeypatch):
    """Names of the clients' files that this process opens to read."""
    found, plain, lower = [], io.open, os.open

    def watch(file, mode="r", *args, **options):
        if "rows/" in str(file) and not set(mode) & set("wax"):
            found.append(str(file).rpartition("/")[2])
        return plain(file, mode, *args, **options)

    def watch_lower(file, flags, *args, **options):
        handle = lower(file, flags, *args, **options)
        if "/rows/" in str(file) and not flags & (os.O_WRONLY | os.O_RDWR | os.O_DIRECTORY):
            found.append(str(file).rpartition("/")[2])
        return handle

    for module in (io, builtins):
        monkeypatch.setattr(module, "open", watch)
    monkeypatch.setattr(os, "open", watch_lower)
    return found


@pytest.mark.slow
def test_a_run_with_workers_and_its_continuation_open_no_clients_rows(run_tiny, read):
    options = (*ASKING, "engine.name=workers", "engine.workers=1")
    report, folder = run_tiny(*options, "federation.rounds=1")
    assert read == []
    rows_file(folder / "rows", "tiny_sums").read_text()
    assert set(read) == {f"{file_stem('tiny_sums')}.jsonl"}  # the watch works
    read.clear()
    going_on, _ = run_tiny(*options, "federation.rounds=2", "resume=auto", folder=folder)
    assert len(read) == 4  # dealing them out again looks whether a file is as it would be written
    assert [len(line.clients) for line in going_on.rounds] == [4, 4]
    assert report.rounds[0].validation["mean"]["n"] == 16


def test_in_one_process_a_clients_file_is_opened_when_it_trains(run_tiny, read):
    report, _ = run_tiny(*ASKING, "federation.rounds=1", "federation.clients_per_round=3")
    assert sorted(read) == [f"{file_stem(client)}.jsonl" for client in report.rounds[0].clients]
    assert len(read) == 3


def test_fidelity_opens_no_clients_rows(tmp_path, read):
    compress_only(load_config([*SMALL, f"output_dir={tmp_path / 'out'}", "evaluation.models=[]"]))
    assert read == []
    assert len(list((tmp_path / "out/rows").iterdir())) == 4
