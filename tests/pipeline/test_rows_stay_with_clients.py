"""After rows are dealt out the main process opens no client's file, at the start of a run and when it goes on."""

import builtins
import io

import pytest

from fedproxy.config import load_config
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
    found, plain = [], io.open

    def watch(file, mode="r", *args, **options):
        if "rows/" in str(file) and not set(mode) & set("wax"):
            found.append(str(file).rpartition("/")[2])
        return plain(file, mode, *args, **options)

    for module in (io, builtins):
        monkeypatch.setattr(module, "open", watch)
    return found


@pytest.mark.slow
def test_a_run_with_workers_and_its_continuation_open_no_clients_rows(run_tiny, read):
    options = (*ASKING, "engine.name=workers", "engine.workers=1")
    report, folder = run_tiny(*options, "federation.rounds=1")
    (folder / "rows/tiny_sums.jsonl").read_text()
    assert read == ["tiny_sums.jsonl"]  # the watch works, and this was the first
    going_on, _ = run_tiny(*options, "federation.rounds=2", "resume=auto", folder=folder)
    assert len(read) == 1
    assert [len(line.clients) for line in going_on.rounds] == [4, 4]
    assert report.rounds[0].validation["mean"]["n"] == 16


def test_in_one_process_a_clients_file_is_opened_when_it_trains(run_tiny, read):
    report, _ = run_tiny(*ASKING, "federation.rounds=1", "federation.clients_per_round=3")
    assert sorted(read) == [f"{client}.jsonl" for client in report.rounds[0].clients]
    assert len(read) == 3


def test_fidelity_opens_no_clients_rows(tmp_path, read):
    compress_only(load_config([*SMALL, f"output_dir={tmp_path / 'out'}", "evaluation.models=[]"]))
    assert read == []
    assert len(list((tmp_path / "out/rows").iterdir())) == 4
