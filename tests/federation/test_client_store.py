"""A checkpoint names the clients' files that it needs, and goes with them or not at all."""

import shutil

import pytest
import torch

from fedproxy.errors import CheckpointError
from fedproxy.federation.client.memory import Memory
from fedproxy.federation.client.store import ClientStore
from fedproxy.federation.server.checkpoint import CheckpointFolder, Progress
from fedproxy.names import file_stem


def remembered(value):
    return Memory({"personal": {"w": torch.tensor([float(value), 1.0])}}, num_examples=3)


def rounds(folder, number):
    """Rounds in which ann takes part every time and bob in the first alone; checkpoints of the last two stay."""
    store, checkpoints, kept = ClientStore(folder), CheckpointFolder(folder), {}
    for round_ in range(1, number + 1):
        clients = ["ann", "bob"] if round_ == 1 else ["ann"]
        for client in clients:
            store.memory.save(client, round_, remembered(round_))
        kept = store.kept(kept, round_, clients)
        checkpoints.save(Progress(round_, {"w": torch.full((2,), float(round_))}, client_files=kept))
    return store, checkpoints


def latest(store, checkpoints):
    said = []
    return checkpoints.load_latest(lambda progress: store.check(progress.client_files), said.append), said


def test_the_last_file_of_every_client_is_named(tmp_path):
    store, checkpoints = rounds(tmp_path, 3)
    progress, said = latest(store, checkpoints)
    assert {key: list(files) for key, files in progress.client_files.items()} == {
        "memory/ann": ["3"],
        "memory/bob": ["1"],
    }
    assert (progress.round, said) == (3, [])


@pytest.mark.parametrize("how", ["gone", "flipped", "of another round", "of another client", "of other content"])
def test_memory_that_is_not_what_it_was_rewinds_to_the_checkpoint_before(tmp_path, how):
    store, checkpoints = rounds(tmp_path, 3)
    path = tmp_path / f"clients/{file_stem('ann')}/round_0003.safetensors"
    content = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
    elif how == "flipped":
        content[-5] ^= 1
        path.write_bytes(content)
    elif how == "of another round":
        shutil.copy(tmp_path / f"clients/{file_stem('ann')}/round_0002.safetensors", path)
    elif how == "of another client":
        shutil.copy(tmp_path / f"clients/{file_stem('bob')}/round_0001.safetensors", path)
    else:
        store.memory.save("ann", 3, remembered(7))
    progress, said = latest(store, checkpoints)
    assert progress.round == 2
    assert len(said) == 1
    assert "client 'ann'" in said[0]
    assert said[0].endswith("going on after round 2, from the checkpoint before it")
    store.rewind(progress.round)
    assert float(store.memory.load("ann", before=3).parts["personal"]["w"][0]) == 2.0


def test_a_file_that_all_checkpoints_need_ends_in_one_line(tmp_path):
    store, checkpoints = rounds(tmp_path, 3)
    shutil.rmtree(tmp_path / "clients" / file_stem("bob"))
    with pytest.raises(CheckpointError, match=r"client 'bob' .*round_0001.*No such file.*, and no checkpoint before"):
        latest(store, checkpoints)


def test_checkpoints_after_the_one_that_was_gone_on_from_disappear_when_it_is_replaced(tmp_path):
    store, checkpoints = rounds(tmp_path, 3)
    (tmp_path / "round_0003").rename(tmp_path / "round_0009")
    progress, _ = latest(store, checkpoints)
    assert progress.round == 2
    assert checkpoints.rounds() == [2, 9]
    checkpoints.save(Progress(3, progress.state))
    assert checkpoints.rounds() == [2, 3]
