"""What a client keeps comes back to the bit, as it was before the round at hand, and stays few files."""

import pytest
import torch

from fedproxy.errors import CheckpointError
from fedproxy.federation.client.memory import ClientMemory, Memory
from fedproxy.names import file_stem


def kept(value):
    tensors = {"m.lora_B.weight": torch.full((2, 3), float(value))}
    return Memory(
        {"personal": tensors, "control_variates": {"m.lora_A.weight": torch.tensor(-float(value))}}, num_examples=5
    )


def value(memory):
    return float(memory.parts["personal"]["m.lora_B.weight"][0, 0])


def test_empty_before_the_first_round_and_bit_exact_after(tmp_path):
    store = ClientMemory(tmp_path / "clients")
    assert store.load("ward a", before=1).parts == {}
    assert not (tmp_path / "clients").exists()
    store.save("ward a", 1, kept(0.1))
    back = store.load("ward a", before=2)
    assert sorted(back.parts) == ["control_variates", "personal"]
    for part, tensors in kept(0.1).parts.items():
        assert all(torch.equal(back.parts[part][name], tensor) for name, tensor in tensors.items())
    assert (back.num_examples, back.num_tokens) == (5, 0)
    assert store.load("ward b", before=2).parts == {}


def test_a_round_reads_what_was_kept_before_it_whatever_came_later(tmp_path):
    store = ClientMemory(tmp_path)
    for round_ in (1, 3, 4):
        store.save("c", round_, kept(round_))
    # a client that was not in round 2 enters round 3 with the memory of round 1
    assert [value(store.load("c", before=before)) for before in (2, 3, 4, 5)] == [1.0, 1.0, 3.0, 4.0]


def test_rewind_and_drop_forget_later_rounds_and_half_written_files(tmp_path):
    store = ClientMemory(tmp_path)
    for round_ in (1, 2, 3):
        store.save("c", round_, kept(round_))
    (tmp_path / file_stem("c") / "round_0004.part99").write_bytes(b"half")
    store.rewind(2)
    assert sorted(path.name for path in (tmp_path / file_stem("c")).iterdir()) == [
        "round_0001.safetensors",
        "round_0002.safetensors",
    ]
    store.drop(["c", "never seen"], 2)
    assert value(store.load("c", before=9)) == 1.0


def test_only_three_rounds_stay_on_disk(tmp_path):
    store = ClientMemory(tmp_path)
    for round_ in range(1, 20):
        store.save("c", round_, kept(round_))
    assert len(list((tmp_path / file_stem("c")).iterdir())) == 3
    # the two latest checkpoints are those of rounds 18 and 19
    assert [value(store.load("c", before=before)) for before in (19, 20)] == [18.0, 19.0]


def test_names_that_are_no_file_names_stay_inside_the_folder(tmp_path):
    store = ClientMemory(tmp_path / "clients")
    store.save("../a/b", 1, kept(1))
    assert [path.name for path in tmp_path.iterdir()] == ["clients"]
    assert len(list((tmp_path / "clients").iterdir())) == 1
    assert value(store.load("../a/b", before=2)) == 1.0


@pytest.mark.parametrize("name", [".", "..", "..."])
def test_names_of_dots_stay_inside_too(tmp_path, name):
    store = ClientMemory(tmp_path / "clients")
    store.save(name, 1, kept(1))
    assert [path.is_dir() for path in (tmp_path / "clients").iterdir()] == [True]
    assert [path.name for path in tmp_path.iterdir()] == ["clients"]
    assert value(store.load(name, before=2)) == 1.0


def test_a_truncated_file_is_one_line(tmp_path):
    store = ClientMemory(tmp_path)
    store.save("c", 1, kept(1))
    path = tmp_path / file_stem("c") / "round_0001.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(
        CheckpointError, match=r"what is kept of client 'c' in .* cannot be used: .*overwrite=true"
    ) as caught:
        store.load("c", before=2)
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_one_line_and_the_last_memory_stays(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    store = ClientMemory(tmp_path)
    store.save("c", 1, kept(1))

    def full(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("fedproxy.sealed_tensors.save_file", full)
    with pytest.raises(CheckpointError, match=r"round_0002.safetensors cannot be written: I/O error: No space left"):
        store.save("c", 2, kept(2))
    assert value(store.load("c", before=9)) == 1.0
