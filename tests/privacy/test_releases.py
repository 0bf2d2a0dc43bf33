import os
import time
from pathlib import Path

import pytest
import torch

from fedproxy.errors import CheckpointError
from fedproxy.privacy.releases import Releases
from fedproxy.privacy.server_noise import ServerNoise

DELTA = {"b": torch.randn(3, 4), "a": torch.tensor(2.0)}
FIGURES = {"steps": torch.tensor(7)}


def test_a_release_is_read_back_to_the_bit_and_verified(tmp_path):
    releases = Releases(tmp_path, "a client")
    seal = releases.write(3, DELTA, FIGURES)
    delta, figures = releases.read(3, seal)
    assert delta.keys() == DELTA.keys()
    assert all(torch.equal(delta[name], DELTA[name]) for name in DELTA)
    assert int(figures["steps"]) == 7
    with pytest.raises(CheckpointError, match=r"cannot be used"):
        releases.read(3, "0" * 64)
    file = next((tmp_path / "releases").rglob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-4] + b"oops")
    with pytest.raises(CheckpointError, match=r"cannot be used"):
        Releases(tmp_path, "a client").read(3, seal)


def test_others_are_deleted_with_what_a_killed_process_left(tmp_path):
    releases = Releases(tmp_path, "a")
    for number in (*range(4), 18):
        releases.write(number, DELTA, FIGURES)
    folder = next(tmp_path.rglob("*.safetensors")).parent
    old, young = folder / "round_0009.part1", folder / "round_0009.part2"
    for part in (old, young):
        part.write_text("half")
    os.utime(old, (time.time() - 1e6,) * 2)
    releases.keep({1, 3, 17})
    assert sorted(path.name for path in folder.iterdir()) == [
        "round_0001.safetensors",
        "round_0003.safetensors",
        "round_0009.part2",
        "round_0018.safetensors",  # of a charge that another run made meanwhile
    ]


def test_a_release_that_another_run_is_just_writing_does_not_end_this_one(tmp_path, monkeypatch):
    """Its half-written file has got its name between the look into the folder and the look at the file."""
    releases = Releases(tmp_path, "a")
    releases.write(1, DELTA, FIGURES)
    folder = next(tmp_path.rglob("*.safetensors")).parent
    glob = Path.glob

    def renamed(self, pattern):
        return [folder / "round_0002.part77"] if self == folder else glob(self, pattern)

    monkeypatch.setattr(Path, "glob", renamed)
    releases.keep({1})
    assert [path.name for path in folder.iterdir()] == ["round_0001.safetensors"]


def test_a_round_merged_again_from_the_same_updates_has_the_same_noise_and_other_updates_are_refused(tmp_path):
    noise, updates = ServerNoise(tmp_path / "noise.json"), {"b": "2" * 64, "a": "1" * 64}
    first = noise.key(1, updates)
    assert ServerNoise(tmp_path / "noise.json").key(1, dict(sorted(updates.items()))) == first
    assert noise.key(2, updates) != first
    for other in ({"a": "1" * 64}, {**updates, "b": "3" * 64}):
        with pytest.raises(CheckpointError, match=r"round 1 was merged before from updates of a, b, .* answer again"):
            noise.key(1, other)
    assert ServerNoise(tmp_path / "other.json").key(1, updates) != first


def test_the_servers_secret_is_missed(tmp_path):
    with pytest.raises(CheckpointError, match=r"the secret of the noise at the server, is gone; put back a copy"):
        ServerNoise(tmp_path / "noise.json").key(2, {"a": "1" * 64})
