"""The door for updates that come as files: bounded before they are parsed, of one form, then the server's own."""

import json
import os
import resource
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from fedproxy.errors import CheckpointError, ClientError
from fedproxy.federation.server.admission import Form, Vault, admit
from fedproxy.federation.server.expected import Expected, Group
from fedproxy.federation.server.participation import Participation
from fedproxy.messages import UpdateFile
from fedproxy.protocol import FORMAT, Broadcast, ClientUpdate
from fedproxy.strategies.aggregators import Aggregator

STATE = {"a": torch.zeros(3, 2), "b": torch.zeros(4), "c": torch.zeros(2, dtype=torch.bfloat16)}
SENT = Broadcast(2, STATE)
PLAIN = Expected()
FISHER = Expected(extras={"fisher": Group({"a": torch.zeros(2, device="meta")}, squares=True)})
META = {"format": FORMAT, "kind": "client_update"}


def update(**change):
    return ClientUpdate("ann", {name: torch.ones_like(tensor) for name, tensor in STATE.items()}, round=2, **change)


def fields(**change):
    return json.dumps({"client_id": "ann", "round": 2, "extras": [], **change})


def header(**change):
    """The header that the update has, and what an attacker changes in it."""
    entries = {
        "__metadata__": {**META, "meta": fields()},
        "delta/a": {"dtype": "F32", "shape": [3, 2], "data_offsets": [0, 24]},
        "delta/b": {"dtype": "F32", "shape": [4], "data_offsets": [24, 40]},
        "delta/c": {"dtype": "BF16", "shape": [2], "data_offsets": [40, 44]},
    }
    return {**entries, **change}


def forge(path, head, data=bytes(44)):
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def take(path, expected=PLAIN, vault=None):
    return admit(UpdateFile("ann", path), Form.of(SENT, expected), vault or Vault())


def test_an_honest_file_is_taken_in_and_its_place_is_free_again(tmp_path):
    update(extras={"fisher": {"a": torch.tensor([1.0, 2.0])}}, num_examples=7).save(tmp_path / "u")
    got = take(tmp_path / "u", FISHER)
    assert not (tmp_path / "u").exists()
    assert (got.client_id, got.round, got.num_examples) == ("ann", 2, 7)
    assert {name: (t.dtype, t.shape) for name, t in got.delta.items()} == {
        n: (t.dtype, t.shape) for n, t in STATE.items()
    }
    assert all(bool((tensor == 1).all()) for tensor in got.delta.values())
    assert got.extras["fisher"]["a"].tolist() == [1.0, 2.0]


def test_the_forged_header_of_these_tests_is_right_where_nothing_is_changed(tmp_path):
    assert take(forge(tmp_path / "u", header())).delta["b"].tolist() == [0.0] * 4


def entry(dtype="F32", shape=(4,), offsets=(24, 40), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


FORGED = [
    (b"", r"shorter than its header|not JSON"),
    (b"[" * 3000, r"its header is not JSON that can be read \(it is nested too deeply\)"),
    (b"\xff\xfe{}", r"its header is not JSON that can be read"),
    (b"7", r"its header is not a JSON object"),
    (b'{"a": ' + b"9" * 5000 + b"}", r"its header is not JSON that can be read"),
    (json.dumps(header()).encode()[:-1] + b', "delta/b": {}}', r"not JSON that can be read \(a key is named twice\)"),
    (header(__metadata__=7), r"its metadata are not texts"),
    (header(__metadata__={"format": 1}), r"its metadata are not texts"),
    (header(**{"delta/b": 5}), r"tensor 'delta/b' must have dtype, shape and data_offsets"),
    (header(**{"delta/b": entry(more=1)}), r"tensor 'delta/b' must have dtype, shape and data_offsets"),
    (header(**{"delta/b": entry("C64")}), r"tensor 'delta/b' is of type C64; send one of F64"),
    (header(**{"delta/b": entry(["F32"])}), r"tensor 'delta/b' is of type \['F32'\]"),
    (header(**{"delta/b": entry(shape=[-4])}), r"tensor 'delta/b' must have whole numbers"),
    (header(**{"delta/b": entry(shape=[4.0])}), r"tensor 'delta/b' must have whole numbers"),
    (header(**{"delta/b": entry(shape=[True] * 4)}), r"tensor 'delta/b' must have whole numbers"),
    (header(**{"delta/b": entry(shape=[1 << 70])}), r"tensor 'delta/b' must have whole numbers"),
    (header(**{"delta/b": entry(offsets=[24])}), r"tensor 'delta/b' must have whole numbers"),
    (header(**{"delta/b": entry(offsets=[24, 44])}), r"tensor 'delta/b' has other data_offsets than its shape needs"),
    (header(**{"delta/b": entry(offsets=[8, 24])}), r"tensor 'delta/b' does not begin where the one before it ends"),
    (header(**{"delta/b": entry(offsets=[28, 44])}), r"does not begin where the one before it ends"),
    (header(**{"delta/b": entry(shape=[5], offsets=[24, 44])}), r"tensor 'delta/c' does not begin where"),
    (header(**{"delta/b": entry("I32")}), r"tensor 'b' must be float32 \(4,\), got int32 \(4,\)"),
    (header(**{"delta/b": entry(shape=[2, 2])}), r"tensor 'b' must be float32 \(4,\), got float32 \(2, 2\)"),
    ({k: v for k, v in header().items() if k != "delta/c"}, r"its tensors have 40 bytes, and the file holds 44"),
    (header(**{"delta/d": entry(shape=[0], offsets=[44, 44])}), r"has unknown tensor 'd'; send exactly the tensors"),
    (header(**{"state/d": entry(shape=[0], offsets=[44, 44])}), r"has unknown tensor 'state/d'"),
    (header(**{"delta/\x1b[31m\u202e": entry(shape=[0], offsets=[44, 44])}), r"has unknown tensor '\\x1b\[31m\\u202e'"),
    (header(__metadata__={**META, "kind": "broadcast", "meta": fields()}), r"is not a FedProxy client update"),
    (header(__metadata__={**META, "meta": "[" * 5000}), r"has a header that cannot be read"),
    (header(__metadata__={**META, "meta": fields(rank=3)}), r"has other fields than a client update \(.*rank"),
    (header(__metadata__={**META, "meta": fields(extras=["fisher"])}), r"has unknown extras 'fisher'"),
    (header(__metadata__={**META, "meta": fields(extras=[f"g{i}" for i in range(3000)])}), r"its update has \d+ bytes"),
    (header(__metadata__={**META, "meta": fields(client_id="bob")}), r"its update is in the name of client 'bob'"),
    (header(__metadata__={**META, "meta": fields(client_id=[1])}), r"its update is in the name of client \[1\]"),
    (header(__metadata__={**META, "meta": fields(), "more": "x" * (1 << 20)}), r"its update has 10\d+ bytes"),
]


@pytest.mark.parametrize(("head", "reason"), FORGED)
def test_forged_files_are_one_line(tmp_path, head, reason):
    path = forge(tmp_path / "u", head)
    with pytest.raises(ClientError, match=reason) as caught:
        take(path)
    assert str(caught.value).isprintable()
    assert str(tmp_path) not in str(caught.value)  # it is kept in the run's records
    assert not path.exists()


def test_lengths_that_lie_are_refused_before_anything_is_read(tmp_path):
    whole = forge(tmp_path / "u", header()).read_bytes()
    for data in (whole[:-1], whole + b"x", whole[:7], (1 << 63).to_bytes(8, "little") + whole[8:], b""):
        (tmp_path / "u").write_bytes(data)
        with pytest.raises(ClientError, match=r"is not a readable safetensors file"):
            take(tmp_path / "u")


def test_a_header_of_3000_groups_costs_neither_memory_nor_time(tmp_path):
    state = {f"layer.{i}": torch.zeros(1) for i in range(200)}
    groups = {f"extras/g{i}/x": torch.zeros(0) for i in range(3000)}
    delta = {f"delta/{name}": tensor for name, tensor in state.items()}
    meta = {**META, "meta": fields(extras=[f"g{i}" for i in range(3000)])}
    save_file({**delta, **groups}, tmp_path / "u", metadata=meta)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(ClientError, match=r"its update has \d+ bytes, an update of this round has at most"):
        admit(UpdateFile("ann", tmp_path / "u"), Form.of(Broadcast(2, state), Expected()), Vault())
    assert time.process_time() - started < 0.5  # it took 100 s
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


def test_the_longest_legal_header_is_let_in(tmp_path):
    state = {f"{'ä' * 40}{i}": torch.zeros(1, 2, 3) for i in range(50)}
    sent = ClientUpdate("\u202e" * 100, dict(state), 10**9, 10**9, -1.2345678901234567e-300, round=10**9)
    sent.save(tmp_path / "u")
    got = admit(UpdateFile(sent.client_id, tmp_path / "u"), Form.of(Broadcast(10**9, state), Expected()), Vault())
    assert got.client_id == sent.client_id


def test_what_changes_after_its_check_is_not_what_is_merged(tmp_path):
    """The sender keeps the file open, overwrites it and cuts it short: the server merges what it checked."""
    update().save(tmp_path / "u")
    with (tmp_path / "u").open("r+b") as sender:
        got = take(tmp_path / "u")
        sender.seek(-44, os.SEEK_END)
        sender.write(torch.full((11,), float("nan")).numpy().tobytes())
        sender.truncate(20)
    merged = Aggregator.by_name("fedavg")().aggregate([got, replace(update(), client_id="bob")])
    assert all(bool((tensor == 1).all()) for tensor in merged.delta.values())


def test_a_file_that_shrinks_while_it_is_copied_drops_its_client(tmp_path, monkeypatch):
    update().save(tmp_path / "u")
    of = ClientUpdate.of

    def shrink(file):
        os.truncate(tmp_path / "u", (tmp_path / "u").stat().st_size - 8)
        return of(file)

    monkeypatch.setattr(ClientUpdate, "of", shrink)
    with pytest.raises(ClientError, match=r"its update became shorter while it was read"):
        take(tmp_path / "u")


def test_copies_lie_in_the_servers_folder_without_a_name(tmp_path):
    folder, vault = tmp_path / "server", None
    folder.mkdir()
    vault = Vault(folder)
    for _ in range(3):
        update().save(tmp_path / "u")
        take(tmp_path / "u", vault=vault)
    assert not list(folder.iterdir())
    assert os.fstat(vault._file.fileno()).st_size == 3 * 44


def test_a_full_disk_is_the_servers_fault_and_drops_nobody(tmp_path, monkeypatch):
    update().save(tmp_path / "u")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedproxy.federation.server.admission.os.pwrite", full)

    class Engine:
        def run(self, broadcast, client_ids, *, timeout_s=None):
            yield UpdateFile("ann", tmp_path / "u")

    with pytest.raises(CheckpointError, match=r"cannot be copied to .* \(No space left on device\); free disk space"):
        Participation(1).collect(Engine(), SENT, ["ann"])
