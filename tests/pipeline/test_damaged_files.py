"""Every file that a run keeps, damaged in every way: one line or a repair that is said, no traceback, nothing waits."""

import os
import shutil
from pathlib import Path

import pytest

from fedproxy import report as report_command
from fedproxy.config import load_config
from fedproxy.errors import FedProxyError
from fedproxy.pipeline.display import Display
from fedproxy.pipeline.run import run

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
    "checkpoints/round_0002/conflict.safetensors",
    "checkpoints/round_0001/progress.json",
    "checkpoints/clients/tiny_sums/round_0002.safetensors",
    "rows/tiny_sums.jsonl",
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


class Lines(Display):
    """Keeps what is said."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def say(self, line):
        self.lines.append(line)


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


CASES = [(name, way) for name in KEPT for way in WAYS]


@pytest.mark.parametrize(("name", "way"), CASES)
def test_a_damaged_file_is_one_line_or_a_repair(with_memory, tmp_path, name, way, capsys):
    folder = copied(with_memory, tmp_path)
    WAYS[way](folder / name)
    for error in try_all(folder, MEMORY):
        assert "\n" not in error
        assert ";" in error
        print(error)
