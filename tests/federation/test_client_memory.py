"""What a client keeps comes back to the bit, as it was after the round that the server names, and stays few files."""

import pytest
import torch

from fedproxy.errors import CheckpointError
from fedproxy.federation.client.memory import ClientMemory
from fedproxy.messages import Rewind
from fedproxy.names import file_stem
from fedproxy.protocol import Kept


def kept(value):
    tensors = {"m.lora_B.weight": torch.full((2, 3), float(value))}
    return {"personal": tensors, "control_variates": {"m.lora_A.weight": torch.tensor(-float(value))}}


def value(parts):
    return float(parts["personal"]["m.lora_B.weight"][0, 0])


def save(store, client, *rounds):
    """Keep a round's number after each round, and return what the server knows of each."""
    return {round_: Kept(round_, store.save(client, round_, kept(round_))) for round_ in rounds}


def test_empty_before_the_first_round_and_bit_exact_after(tmp_path):
    store = ClientMemory(tmp_path / "site")
    assert store.load("ward a", Kept()) == {}
    assert not (tmp_path / "site").exists()
    back = store.load("ward a", Kept(1, store.save("ward a", 1, kept(0.1))))
    assert sorted(back) == ["control_variates", "personal"]
    for part, tensors in kept(0.1).items():
        assert all(torch.equal(back[part][name], tensor) for name, tensor in tensors.items())
    assert store.load("ward b", Kept()) == {}


def test_a_round_reads_what_the_server_names_whatever_came_later(tmp_path):
    store = ClientMemory(tmp_path)
    known = save(store, "c", 1, 3, 4)
    assert [value(store.load("c", known[round_])) for round_ in known] == [1.0, 3.0, 4.0]
    with pytest.raises(CheckpointError, match=r"client 'c' in .*round_0003.* cannot be used: it is not the one that"):
        store.load("c", Kept(3, known[4].seal))
    with pytest.raises(CheckpointError, match=r"client 'c' in .*round_0002.* cannot be used: No such file"):
        store.load("c", Kept(2, known[1].seal))


def test_going_back_forgets_later_rounds_and_half_written_files(tmp_path):
    store = ClientMemory(tmp_path)
    known, folder = save(store, "c", 1, 2, 3), tmp_path / "clients" / file_stem("c")
    (folder / "round_0004.part99").write_bytes(b"half")
    store.rewind("c", Rewind(2, known[2]))
    assert sorted(path.name for path in folder.iterdir()) == ["round_0001.safetensors", "round_0002.safetensors"]
    store.rewind("never seen", Rewind(2, Kept()))
    store.forget_after("c", 1)
    assert value(store.load("c", known[1])) == 1.0
    with pytest.raises(CheckpointError, match="No such file"):
        store.rewind("c", Rewind(2, known[2]))


def test_only_three_rounds_stay_on_disk(tmp_path):
    store = ClientMemory(tmp_path)
    known = save(store, "c", *range(1, 20))
    assert len(list((tmp_path / "clients" / file_stem("c")).iterdir())) == 3
    # the two latest checkpoints are those of rounds 18 and 19
    assert [value(store.load("c", known[round_])) for round_ in (18, 19)] == [18.0, 19.0]


def test_names_that_are_no_file_names_stay_inside_the_folder(tmp_path):
    store = ClientMemory(tmp_path)
    known = save(store, "../a/b", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["clients"]
    assert len(list((tmp_path / "clients").iterdir())) == 1
    assert value(store.load("../a/b", known[1])) == 1.0


@pytest.mark.parametrize("name", [".", "..", "..."])
def test_names_of_dots_stay_inside_too(tmp_path, name):
    store = ClientMemory(tmp_path)
    known = save(store, name, 1)
    assert [path.is_dir() for path in (tmp_path / "clients").iterdir()] == [True]
    assert [path.name for path in tmp_path.iterdir()] == ["clients"]
    assert value(store.load(name, known[1])) == 1.0


def test_a_truncated_file_is_one_line(tmp_path):
    store = ClientMemory(tmp_path)
    known = save(store, "c", 1)
    path = tmp_path / "clients" / file_stem("c") / "round_0001.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(
        CheckpointError, match=r"what is kept of client 'c' in .* cannot be used: .*overwrite=true"
    ) as caught:
        store.load("c", known[1])
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_one_line_and_the_last_memory_stays(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    store = ClientMemory(tmp_path)
    known = save(store, "c", 1)

    def full(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("fedproxy.tensor_files.save_file", full)
    with pytest.raises(
        CheckpointError, match=r"round_0002.safetensors cannot be written: No space left on device; free"
    ):
        store.save("c", 2, kept(2))
    assert value(store.load("c", known[1])) == 1.0
