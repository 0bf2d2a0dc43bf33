"""Every file that a run keeps, damaged in every way: one line or a repair that is said, no traceback, nothing waits."""

import os
import shutil
from pathlib import Path

import pytest

from fedproxy import report as report_command
from fedproxy.config import load_config
from fedproxy.errors import FedProxyError
from fedproxy.evaluation.results import EvaluationResult
from fedproxy.names import file_stem
from fedproxy.pipeline.kept_scores import KeptScores
from fedproxy.pipeline.run import run
from fedproxy.reporting import RunReport
from fedproxy.reporting.comparison.records import Record

from .lines import Lines

SMALL = (
    "recipe=fedproxy_tiny",
    "data.tasks=[tiny_sums,tiny_colors]",
    "data.rows_per_task=8",
    "client.batch_size=8",
    "evaluation.limit=2",
    "federation.rounds=2",
    "loggers=[csv]",
)
MEMORY = (*SMALL, "regularizer={name: scaffold}", "aggregator={name: fedavg}", "evaluation.models=[proxy]")
SEPARATE = (*SMALL, "aggregator={name: none}", "regularizer={name: none}", "evaluation.models=[fused]")
SUMS = file_stem("tiny_sums")
DEEP = b"[" * 200_000 + b"]" * 200_000
WAYS = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "half of the last line": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "a flipped bit": lambda path: flip(path, path.stat().st_size // 2),
    "a flipped last byte": lambda path: flip(path, path.stat().st_size - 2),
    "a list": lambda path: path.write_bytes(b"[]"),
    "an object": lambda path: path.write_bytes(b"{}"),
    "null": lambda path: path.write_bytes(b"null"),
    "deep": lambda path: path.write_bytes(DEEP),
    "binary": lambda path: path.write_bytes(bytes(range(256)) * 4),
    "empty": lambda path: path.write_bytes(b""),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "gone": lambda path: path.unlink(),
}
KEPT = [
    "server/facts.json",
    "server/layer_map.json",
    "partition.json",
    "rounds.jsonl",
    "report.json",
    "proxy/config.json",
    "proxy/model.safetensors",
    "proxy/tokenizer.json",
    "adapter/adapter_model.safetensors",
    "fused/model.safetensors",
    "checkpoints/round_0002/progress.json",
    "checkpoints/round_0002/state.safetensors",
    "checkpoints/round_0002/control_variates.safetensors",
    "checkpoints/round_0001/progress.json",
    f"checkpoints/clients/{SUMS}/round_0002.safetensors",
    f"rows/{SUMS}.jsonl",
    "evaluation/proxy.scores.json",
    "evaluation/proxy.samples.jsonl",
    "evaluation/proxy.json",
    "logs/csv.json",
    "logs/csv/metrics.csv",
]


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


def go(folder, *overrides):
    display = Lines()
    return run(load_config([*overrides, f"output_dir={folder}"]), display), display.lines


def copied(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "run"))


@pytest.fixture(scope="module")
def with_memory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory") / "run"
    go(folder, *MEMORY)
    return folder


def try_all(folder, overrides):
    """Go on with a damaged run by one round, then make its pages again; return the lines of errors."""
    errors = []
    try:
        go(folder, *overrides, "resume=auto", "federation.rounds=3")
    except FedProxyError as error:
        errors.append(str(error))
    for command in (lambda: report_command.main([str(folder)]), lambda: report_command.main([str(folder)] * 2)):
        try:
            command()
        except FedProxyError as error:
            errors.append(str(error))
    return errors


def cases():
    """Every file in every way; the quick tests damage every file in two ways, and in every way some file."""
    for row, name in enumerate(KEPT):
        for column, way in enumerate(WAYS):
            quick = (column - row) % len(WAYS) in (0, 5)
            yield pytest.param(name, way, marks=[] if quick else pytest.mark.slow)


@pytest.mark.parametrize(("name", "way"), cases())
def test_a_damaged_file_is_one_line_or_a_repair(with_memory, tmp_path, name, way):
    folder = copied(with_memory, tmp_path)
    WAYS[way](folder / name)
    for error in try_all(folder, MEMORY):
        assert "\n" not in error
        assert ";" in error


@pytest.fixture(scope="module")
def separate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("separate") / "run"
    go(folder, *SEPARATE)
    return folder


@pytest.mark.parametrize("way", ["truncated", "a flipped last byte", "a pipe", "a folder", "gone"])
def test_a_damaged_state_of_one_client_rewinds_everybody_and_blames_nobody(separate, tmp_path, way):
    folder = copied(separate, tmp_path)
    WAYS[way](folder / f"checkpoints/states/{SUMS}/round_0002.safetensors")
    report, lines = go(folder, *SEPARATE, "resume=auto", "federation.rounds=3")
    assert [line.dropped for line in report.rounds] == [{}, {}, {}]
    (line,) = [line for line in lines if "going on after round 1, from the checkpoint before it" in line]
    assert line in report.notes


@pytest.mark.parametrize("way", ["truncated", "a flipped last byte", "an object"])
@pytest.mark.parametrize("name", [f"fused.{SUMS}.samples.jsonl", f"fused.{SUMS}.scores.json"])
def test_damaged_scores_are_taken_again_and_that_is_said(separate, tmp_path, way, name):
    folder = copied(separate, tmp_path)
    WAYS[way](folder / "evaluation" / name)
    report, lines = go(folder, *SEPARATE, "resume=auto", "evaluation.models=[fused,proxy]")
    assert any(line.startswith(f"fused.{SUMS} is scored again: ") for line in lines)
    assert not any("fused.tiny_colors is scored" in line for line in lines)
    assert report.scores["fused"] == RunReport.load(separate).scores["fused"]


def test_a_damaged_fused_model_is_fused_again(separate, tmp_path):
    folder = copied(separate, tmp_path)
    path = folder / f"fused/{SUMS}/model.safetensors"
    whole = path.read_bytes()
    flip(path, -9)
    _, lines = go(folder, *SEPARATE, "resume=auto", "evaluation.models=[fused,proxy]")
    assert any(line.startswith("fused again: ") and "SHA-256" in line for line in lines)
    assert path.read_bytes() == whole


def test_a_finished_run_makes_a_damaged_report_again(with_memory, tmp_path):
    folder = copied(with_memory, tmp_path)
    whole = RunReport.load(folder)
    for way in ("truncated", "a list", "a pipe", "binary"):
        WAYS[way](folder / "report.json")
        report, lines = go(folder, *MEMORY, "resume=auto")
        assert lines[0].startswith("the report is made again: ")
        assert report.scores == whole.scores


def test_a_journal_is_repaired_from_the_checkpoint(with_memory, tmp_path):
    folder = copied(with_memory, tmp_path)
    whole = (folder / "rounds.jsonl").read_bytes()
    for way in WAYS:
        if way != "a folder":
            WAYS[way](folder / "rounds.jsonl")
            go(folder, *MEMORY, "resume=auto", "evaluation.models=[target,proxy]")
            assert (folder / "rounds.jsonl").read_bytes() == whole
            (folder / "report.json").unlink()


@pytest.mark.parametrize("way", [way for way in WAYS if way != "gone"])
def test_a_damaged_record_or_shared_work_is_one_line_or_made_again(with_memory, tmp_path, way):
    record = Record.of_run(with_memory, "fedavg", {}, RunReport.load(with_memory), 1)
    path = record.save(tmp_path / "record.json")
    if not way.startswith("a flipped"):  # a record is a text that people may edit: its form is checked
        WAYS[way](path)
        with pytest.raises(FedProxyError, match=r"record.json .*; delete it to run that again$"):
            Record.load(path)
    kept, result = KeptScores(tmp_path / "scores"), EvaluationResult({"t": {"acc": 0.5}}, {"acc": 0.5}, [], {}, 1.0)
    lines = []
    kept.write("key", result, lines.append)
    assert kept.read("key", lines.append)[0] == result
    WAYS[way](tmp_path / "scores/key.json")
    assert kept.read("key", lines.append) is None
    kept.write("key", result, lines.append)
    assert all(line.startswith(("kept scores: ", "scores are not kept for other runs: ")) for line in lines)
    assert (kept.read("key", lines.append) is None) == (way == "a folder")
