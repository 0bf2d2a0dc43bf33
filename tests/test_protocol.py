"""What crosses the wire survives the trip, and foreign bytes are refused without unpickling."""

import errno
import os
import pickle
import resource
import signal
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save_file

from fedproxy.errors import ClientError
from fedproxy.protocol import Broadcast, ClientUpdate, TensorFile, nbytes
from fedproxy.seeding import ClientSeeds
from fedproxy.tensor_files import Layout

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.tensor(0.5), "c": torch.ones(2, dtype=torch.bfloat16)}


def assert_same(left, right):
    assert sorted(left) == sorted(right)
    for name in left:
        assert left[name].dtype == right[name].dtype
        assert torch.equal(left[name], right[name])


def test_update_survives_the_trip_and_stays_in_its_file(tmp_path):
    sent = ClientUpdate("bank", STATE, 7, 70, 1.25, 3.0, {"fisher": {"b": torch.tensor(2.0)}}, regularizer_loss=0.5)
    sent.save(tmp_path / "u.safetensors")
    got = ClientUpdate.load(tmp_path / "u.safetensors")
    assert (got.client_id, got.num_examples, got.num_tokens) == ("bank", 7, 70)
    assert (got.train_loss, got.regularizer_loss, got.seconds) == (1.25, 0.5, 3.0)
    assert isinstance(got.delta, TensorFile)
    assert_same(got.delta, STATE)
    assert_same(got.extras["fisher"], sent.extras["fisher"])


@pytest.mark.parametrize("extras", [{}, {"conflict": {}}, {"conflict": STATE, "base_change": {}}])
def test_broadcast_survives_the_trip(tmp_path, extras):
    sent = Broadcast(3, STATE, {"lr": 0.1, "regularizer": {"name": "none"}}, extras)
    sent.save(tmp_path / "b.safetensors")
    got = Broadcast.load(tmp_path / "b.safetensors")
    assert (got.round, got.job) == (3, {"lr": 0.1, "regularizer": {"name": "none"}})
    assert {part: sorted(group) for part, group in got.extras.items()} == {p: sorted(g) for p, g in extras.items()}
    assert_same(got.state, STATE)


def test_bytes_count_every_tensor_sent():
    # 6 float32 + 1 float32 + 2 bfloat16 = 24 + 4 + 4 bytes
    assert nbytes(STATE) == 32
    assert Broadcast(1, STATE, {}, {"conflict": STATE}).bytes == 64
    assert ClientUpdate("a", STATE, extras={"x": {"b": torch.tensor(1.0)}}).bytes == 36


def test_tensor_file_shows_only_its_prefix_and_knows_shapes(tmp_path):
    save_file({"delta/a": torch.zeros(2, 3), "state/b": torch.zeros(1)}, tmp_path / "f.safetensors")
    file = TensorFile(tmp_path / "f.safetensors", "delta/")
    assert list(file) == ["a"]
    assert len(file) == 1
    assert file.shape("a") == (2, 3)
    with pytest.raises(KeyError, match="b"):
        file["b"]


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "u.safetensors"
    path.write_bytes(pickle.dumps({"delta": [1.0]}))
    with pytest.raises(ClientError, match=r"u.safetensors is not a readable safetensors file"):
        ClientUpdate.load(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ClientError, match=r"is not a FedProxy client update"):
        ClientUpdate.load(path)
    Broadcast(1, STATE).save(path)
    with pytest.raises(ClientError, match=r"is not a FedProxy client update"):
        ClientUpdate.load(path)


def test_truncated_file_is_refused(tmp_path):
    path = tmp_path / "u.safetensors"
    ClientUpdate("a", STATE).save(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ClientError, match=r"not a readable safetensors file"):
        ClientUpdate.load(path)


def test_bytes_of_a_file_are_counted_without_reading_it(tmp_path):
    ClientUpdate("a", STATE).save(tmp_path / "u.safetensors")
    assert ClientUpdate.load(tmp_path / "u.safetensors").bytes == 32


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"meta": "{"}, r"has a header that cannot be read"),
        ({"meta": "{}"}, r"has a header that cannot be read"),
        ({"meta": "7"}, r"has a header that cannot be read"),
        ({}, r"has a header that cannot be read"),
        ({"meta": '{"extras": [], "client_id": "a", "rank": 3}'}, r"has other fields than a client update .*rank"),
        ({"meta": '{"extras": []}'}, r"has other fields than a client update .*client_id"),
    ],
)
def test_forged_headers_are_refused(tmp_path, metadata, message):
    path = tmp_path / "u.safetensors"
    save_file({"delta/a": torch.zeros(1)}, path, metadata={"format": "fedproxy-1", "kind": "client_update", **metadata})
    with pytest.raises(ClientError, match=message):
        ClientUpdate.load(path)


def test_tensors_of_a_type_that_may_not_cross_are_refused(tmp_path):
    ClientUpdate("a", {"w": torch.zeros(2, dtype=torch.complex64)}).save(tmp_path / "u.safetensors")
    with pytest.raises(ClientError, match=r"tensor 'delta/w' is of type C64; send one of F64"):
        ClientUpdate.load(tmp_path / "u.safetensors")


@pytest.mark.parametrize(
    "meta", ['{"extras": []}', '{"extras": [], "round": "1", "job": {}}', '{"extras": [], "round": 1, "job": 2}']
)
def test_a_broadcast_without_round_or_job_is_refused(tmp_path, meta):
    metadata = {"format": "fedproxy-1", "kind": "broadcast", "meta": meta}
    save_file({"state/a": torch.zeros(1)}, tmp_path / "b.safetensors", metadata=metadata)
    with pytest.raises(ClientError, match=r"b.safetensors lacks round or job of a broadcast"):
        Broadcast.load(tmp_path / "b.safetensors")


def test_no_broadcasts_file_holds_seeds(tmp_path):
    seeds = {name: ClientSeeds.of(918273645546372819, 1, name, 2) for name in ("ann", "bob")}
    sent = Broadcast(1, STATE, all_seeds=seeds)
    sent.addressed_to("ann").save(tmp_path / "b.safetensors")
    content = (tmp_path / "b.safetensors").read_bytes()
    for number in (918273645546372819, seeds["ann"].batches, *seeds["bob"].dropout):
        assert str(number).encode() not in content
    assert sent.addressed_to("bob").seeds == seeds["bob"]
    assert sent.addressed_to("bob").all_seeds == {}


def test_a_file_with_many_groups_is_parsed_once(tmp_path, monkeypatch):
    update = ClientUpdate("a", STATE, extras={f"g{i}": {"x": torch.zeros(1)} for i in range(50)})
    update.save(tmp_path / "u.safetensors")
    read, calls = Layout.read, []
    monkeypatch.setattr(Layout, "read", lambda *args, **options: calls.append(1) or read(*args, **options))
    assert len(ClientUpdate.load(tmp_path / "u.safetensors").extras) == 50
    assert len(calls) == 1


@pytest.mark.parametrize("kind", ["fifo", "link", "folder"])
def test_only_regular_files_are_read(tmp_path, kind):
    path = tmp_path / "u.safetensors"
    {"fifo": os.mkfifo, "link": lambda path: path.symlink_to("/dev/zero"), "folder": os.mkdir}[kind](path)
    with pytest.raises(ClientError, match=r"u.safetensors is not a readable safetensors file \("):
        ClientUpdate.load(path)


@contextmanager
def small_files():
    """Let this process write files of at most 64 KiB; longer ones fail as on a full disk, but for the number."""
    before, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


@pytest.mark.parametrize(
    "sent", [Broadcast(1, {"w": torch.zeros(1 << 16)}), ClientUpdate("a", {"w": torch.zeros(1 << 16)})]
)
def test_a_disk_that_has_no_room_is_an_error_of_the_system(sent, tmp_path):
    with pytest.raises(OSError, match="File too large") as caught, small_files():
        sent.save(tmp_path / "file")
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / "file"))
