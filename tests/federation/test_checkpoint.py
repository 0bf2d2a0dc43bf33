"""Round checkpoints are whole or absent, bit-exact, and say what is missing."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedproxy.errors import CheckpointError
from fedproxy.federation.server.checkpoint import CheckpointFolder, Progress


def progress(round_):
    generator = torch.Generator().manual_seed(round_)
    state = {"a.weight": torch.randn(3, 2, generator=generator), "b": torch.tensor(1.5)}
    return Progress(
        round_,
        state,
        memory={
            "conflict": {"a.weight": torch.rand(3, 2, generator=generator), "b": torch.tensor(0.25)},
            "server_optimizer": {"m/b": torch.tensor(2.0)},
            "aggregator": {},
            "base_change": {"m.lora_B.weight": torch.zeros(3, 0), "m.lora_A.weight": torch.zeros(0, 2)},
        },
        records=[{"round": i + 1, "train_loss": 0.1 * i} for i in range(round_)],
    )


def test_what_is_saved_comes_back_to_the_bit(tmp_path):
    folder = CheckpointFolder(tmp_path / "checkpoints")
    assert folder.load_latest() is None
    sent = progress(3)
    folder.save(sent)
    got = folder.load_latest()
    assert got is not None
    assert (got.round, got.records) == (3, sent.records)
    assert sorted(got.memory) == sorted(sent.memory)
    for left, right in [(sent.state, got.state), *((sent.memory[name], got.memory[name]) for name in sent.memory)]:
        assert sorted(left) == sorted(right)
        assert all(torch.equal(left[name], right[name]) for name in left)


def test_the_latest_whole_one_counts_and_old_ones_go(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=2)
    for round_ in (1, 2, 3):
        folder.save(progress(round_))
    (tmp_path / ".part_0004").mkdir()  # killed while writing round 4
    assert folder.rounds() == [2, 3]
    latest = folder.load_latest()
    assert latest is not None
    assert latest.round == 3
    folder.save(progress(4))
    assert folder.rounds() == [3, 4]


def test_a_missing_tensor_is_named(tmp_path):
    folder = CheckpointFolder(tmp_path)
    folder.save(progress(1))
    path = tmp_path / "round_0001" / "state.safetensors"
    tensors = load_file(path)
    del tensors["a.weight"]
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"round_0001 is damaged \(state.safetensors: .*put back a copy"):
        folder.load_latest()


def test_a_truncated_file_is_an_error(tmp_path):
    folder = CheckpointFolder(tmp_path)
    folder.save(progress(1))
    path = tmp_path / "round_0001" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="is damaged"):
        folder.load_latest()


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    folder = CheckpointFolder(tmp_path)
    folder.save(progress(1))

    def full(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("fedproxy.tensor_files.save_file", full)
    with pytest.raises(CheckpointError, match=r"round_0002 cannot be written: No space left on device; free"):
        folder.save(progress(2))
    assert folder.rounds() == [1]
