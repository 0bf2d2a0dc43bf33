"""Runs whose clip follows the clients: what it does from round to round, and that it survives a killed run."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

RUN = (
    "data.rows_per_task=8",
    "client.batch_size=8",
    "evaluation.models=[]",
    "regularizer.name=none",
    "federation.rounds=3",
    "privacy.unit=client",
    "privacy.quantile=0.5",
)
NOISE = ("privacy.noise_multiplier=0.5", "privacy.delta=1e-3", "privacy.accountant=rdp")


def clips(folder):
    return [json.loads(line)["privacy"]["clip"] for line in (folder / "rounds.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("start", "step", "engine"), [(1e-6, 0.1, "in_process"), (1e-6, 0.1, "workers"), (1e6, -0.1, "in_process")]
)
def test_without_noise_the_clip_moves_by_what_the_clients_tell(run_tiny, tmp_path, engine, start, step):
    """No update is within a millionth, and all are within a million: the logarithm moves by 0.2 x 0.5."""
    options = ("privacy.noise_multiplier=0", f"privacy.clip={start}", f"engine.name={engine}")
    report, folder = run_tiny(*RUN, *options, folder=tmp_path / "run")
    assert clips(folder) == pytest.approx([start * math.exp(step * before) for before in range(3)])
    assert (report.privacy.clip, report.privacy.quantile) == (clips(folder)[-1], 0.5)
    assert "follows the quantile 0.5" in (folder / "report.md").read_text()
    norms = [json.loads(line)["update_norms"] for line in (folder / "rounds.jsonl").read_text().splitlines()]
    if start < 1:  # every update has the length of its round's clip
        assert norms == [pytest.approx([clip] * 4, rel=1e-4) for clip in clips(folder)]


@pytest.mark.parametrize("at", ["client", "server"])
def test_a_killed_run_goes_on_with_the_same_clip_and_the_same_bits(run_tiny, tmp_path, at):
    options = (*RUN, *NOISE, f"privacy.noise_at={at}", "aggregator.name=fedavg")
    _, whole = run_tiny(*options, folder=tmp_path / "whole")
    killed = tmp_path / "killed"
    shutil.copytree(whole, killed)
    shutil.rmtree(killed / "checkpoints/round_0003")
    for path in killed.rglob("report.*"):
        path.unlink()
    run_tiny(*options, "resume=auto", folder=killed)
    assert clips(killed) == clips(whole)
    assert len(set(clips(whole))) == 3
    last = "checkpoints/round_0003/state.safetensors"
    one, other = load_file(whole / last), load_file(killed / last)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_clients_tell_is_hidden_under_the_noise_of_its_share(run_tiny, tmp_path):
    """Four noised halves: their mean is off by more than nothing, and the step stays within what a share can do."""
    _, folder = run_tiny(*RUN, *NOISE, "privacy.clip=1e-6", folder=tmp_path / "run")
    steps = [math.log(after / before) for before, after in zip(clips(folder), clips(folder)[1:], strict=False)]
    assert all(abs(step) <= 0.1 + 1e-12 for step in steps)
    told = load_file(folder / "checkpoints/round_0003/privacy.safetensors")
    assert "clip" in told
    assert len(told) == 5
