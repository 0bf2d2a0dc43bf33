"""Files in parts, bundles and frames: nothing that comes in is believed, and a cut transfer goes on where it was."""

import hashlib
import io
import json

import pytest

from fedproxy.errors import ClientError
from fedproxy.wire.bundle import Bundle, unpack
from fedproxy.wire.frames import LONGEST_LINE, BrokenFrameError, Bytes, receive, send
from fedproxy.wire.inbox import Inbox, Piece
from fedproxy.wire.messages import _MOST_CLIENTS, Ask, Greeting, Setup, Train, refusal, run_id, told


def bundle_of(folder, **files):
    folder.mkdir()
    paths = {}
    for name, data in files.items():
        paths[name] = folder / name
        paths[name].write_bytes(data)
    return Bundle(paths)


def written(bundle, path):
    path.write_bytes(b"".join(bundle.read(0, bundle.size)))
    return path


def test_a_bundle_comes_out_as_it_went_in(tmp_path):
    bundle = bundle_of(tmp_path / "from", a=b"x" * 3_000_000, b=b"", c=b"yz")
    paths = unpack(written(bundle, tmp_path / "whole"), tmp_path / "to")
    assert [path.name for path in paths] == ["a", "b", "c"]
    assert [path.read_bytes() for path in paths] == [b"x" * 3_000_000, b"", b"yz"]


@pytest.mark.parametrize(("files", "line"), [(_MOST_CLIENTS, "other files"), (_MOST_CLIENTS + 1, "names no plain")])
def test_a_bundle_holds_a_file_for_each_of_the_most_clients_of_a_site(files, line, tmp_path):
    table = json.dumps([[f"{number:05d}", 0] for number in range(files)]).encode()
    (tmp_path / "bundle").write_bytes(len(table).to_bytes(8, "little") + table)
    with pytest.raises(ClientError, match=line):
        unpack(tmp_path / "bundle", tmp_path / "to", names=[])


@pytest.mark.parametrize("size", [1, 7, 1000, 10**6])
def test_parts_of_any_size_make_the_whole(size, tmp_path):
    bundle = bundle_of(tmp_path / "from", a=bytes(range(256)) * 3, b=b"end")
    parts = [b"".join(bundle.part(at, size).pieces()) for at in range(0, bundle.size, size)]
    assert hashlib.sha256(b"".join(parts)).hexdigest() == bundle.sha256
    assert all(len(part) == size for part in parts[:-1])


@pytest.mark.parametrize("name", ["../x", "/etc/x", ".hidden", "a/b", "", "x" * 101, "a\nb"])
def test_a_bundle_with_a_name_that_leads_elsewhere_is_refused(name, tmp_path):
    table = json.dumps([[name, 1]]).encode()
    (tmp_path / "bad").write_bytes(len(table).to_bytes(8, "little") + table + b"x")
    with pytest.raises(ClientError, match="names no plain files"):
        unpack(tmp_path / "bad", tmp_path / "to")
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\xff" * 8, b"\x02" + bytes(7) + b"{}", b"\x09" + bytes(7) + b'[["a",9]]',
        b"\x13" + bytes(7) + b'[["a",0],["A", 0]] ', b"\x0a" + bytes(7) + b'[["a",-1]]',
        b"\x0c" + bytes(7) + b'[["a",true]]',
    ],
)  # fmt: skip
def test_what_is_no_bundle_is_refused(data, tmp_path):
    (tmp_path / "bad").write_bytes(data)
    with pytest.raises(ClientError, match="what was sent"):
        unpack(tmp_path / "bad", tmp_path / "to")


def test_other_files_than_asked_for_are_refused(tmp_path):
    bundle = bundle_of(tmp_path / "from", a=b"1", b=b"2")
    with pytest.raises(ClientError, match="holds other files than those that were asked for"):
        unpack(written(bundle, tmp_path / "whole"), tmp_path / "to", names=["a"])


def sent(inbox, bundle, at, size, folder, **changes):
    data = b"".join(bundle.part(at, size).pieces())
    (folder / "part").write_bytes(data)
    said = {"file": bundle.sha256, "total": bundle.size, "offset": at, "part": hashlib.sha256(data).hexdigest()}
    return inbox.add(Piece.parse({**said, **changes}, most=1 << 20), folder / "part")


def test_a_transfer_that_is_cut_at_any_part_goes_on_from_there(tmp_path):
    bundle = bundle_of(tmp_path / "from", a=bytes(range(250)))
    for cut in range(0, bundle.size, 64):
        folder = tmp_path / f"inbox_{cut}"
        for at in range(0, cut, 64):
            sent(Inbox(folder), bundle, at, 64, tmp_path)
        have = Inbox(folder).have(bundle.sha256)  # another process
        assert have == cut
        while have < bundle.size:
            have = sent(Inbox(folder), bundle, have, 64, tmp_path)
        assert Inbox(folder).whole(bundle.sha256).read_bytes() == b"".join(bundle.read(0, bundle.size))


def test_half_a_part_that_a_killed_process_left_does_not_count(tmp_path):
    bundle, inbox = bundle_of(tmp_path / "from", a=bytes(range(250))), Inbox(tmp_path / "inbox")
    sent(inbox, bundle, 0, 64, tmp_path)
    with open(tmp_path / "inbox" / f"{bundle.sha256}.part", "ab") as file:
        file.write(b"half")
    have = Inbox(tmp_path / "inbox").have(bundle.sha256)
    assert have == 64
    while have < bundle.size:
        have = sent(inbox, bundle, have, 64, tmp_path)
    assert inbox.whole(bundle.sha256)


def test_a_kill_while_the_whole_is_looked_at_costs_the_last_part_alone(tmp_path, monkeypatch):
    """Of a proxy of many GiB that look takes long; a file that counted as there and was never whole would stay so."""
    bundle, inbox = bundle_of(tmp_path / "from", a=bytes(range(250))), Inbox(tmp_path / "inbox")
    with monkeypatch.context() as patched:
        patched.setattr(Inbox, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        last = (bundle.size - 1) // 64 * 64
        for at in range(0, last, 64):
            sent(inbox, bundle, at, 64, tmp_path)
        with pytest.raises(KeyboardInterrupt):
            sent(inbox, bundle, last, 64, tmp_path)
    have = Inbox(tmp_path / "inbox").have(bundle.sha256)
    assert have == last
    assert sent(Inbox(tmp_path / "inbox"), bundle, have, 64, tmp_path) == bundle.size
    assert inbox.whole(bundle.sha256)


def test_a_part_that_comes_twice_changes_nothing(tmp_path):
    bundle, inbox = bundle_of(tmp_path / "from", a=bytes(range(250))), Inbox(tmp_path / "inbox")
    assert sent(inbox, bundle, 0, 64, tmp_path) == 64
    assert sent(inbox, bundle, 0, 64, tmp_path) == 64


@pytest.mark.parametrize(
    ("at", "changes", "line"),
    [
        (64, {}, "begins at byte 64, and 0 bytes are there"),
        (0, {"part": "0" * 64}, "damaged on its way"),
        (0, {"total": 10}, "begins at byte 0"),
        (0, {"total": 1 << 30}, "1073741824 bytes was announced, 1048576 are the most"),
        (0, {"file": "x"}, "does not say which file"),
        (0, {"offset": True}, "does not say which file"),
    ],
)
def test_a_part_that_cannot_be_right_is_refused(at, changes, line, tmp_path):
    bundle, inbox = bundle_of(tmp_path / "from", a=bytes(range(250))), Inbox(tmp_path / "inbox")
    if changes == {"offset": True}:
        changes = {"offset": "0"}
    with pytest.raises(ClientError, match=line):
        sent(inbox, bundle, at, 64, tmp_path, **changes)
    assert inbox.have(bundle.sha256) == 0


def test_a_whole_with_another_hash_is_thrown_away(tmp_path):
    bundle, inbox = bundle_of(tmp_path / "from", a=b"x"), Inbox(tmp_path / "inbox")
    with pytest.raises(ClientError, match="another hash than announced"):
        sent(inbox, bundle, 0, 64, tmp_path, file="a" * 64)
    assert list((tmp_path / "inbox").iterdir()) == []


def test_frames_carry_a_line_and_bytes(tmp_path):
    stream = io.BytesIO()
    send(stream, {"kind": "x"}, Bytes(b"abc"))
    stream.seek(0)
    assert receive(stream, tmp_path / "payload", most=3) == {"kind": "x"}
    assert (tmp_path / "payload").read_bytes() == b"abc"


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", b"{}\n", b"[]\n", b'{"size": -1}\n', b'{"size": true}\n', b'{"size": 4}\nabcd', b'{"size": 3}\nab'],
)
def test_what_is_no_frame_is_refused(data, tmp_path):
    with pytest.raises(BrokenFrameError, match=r"line|message|closed"):
        receive(io.BytesIO(data), tmp_path / "payload", most=3)


def test_a_line_without_end_is_not_read_to_its_end(tmp_path):
    stream = io.BytesIO(b"x" * (4 * LONGEST_LINE))
    with pytest.raises(BrokenFrameError, match="a line is too long"):
        receive(stream, tmp_path / "payload", most=3)
    assert stream.tell() <= LONGEST_LINE


SETUP = {
    "proxy": "a" * 64, "proxy_bytes": 1, "dtype": "float32", "trainable": {"name": "lora"}, "max_input_tokens": 1,
    "max_target_tokens": 1, "long_rows": "cut", "quantization": "none", "plugins": [],
}  # fmt: skip
TRAIN = {"round": 1, "own": {"a": {}}, "files": {"a": 0}, "bundle": "a" * 64, "seconds": 1.5}
GREETING = {"clients": {"a": 3}, "version": "1", "clock": 1.0, "have": 0, "converse": False}


@pytest.mark.parametrize(
    ("kind", "whole", "change"),
    [
        (Setup, SETUP, {"proxy": "x"}), (Setup, SETUP, {"dtype": "int8"}), (Setup, SETUP, {"trainable": {}}),
        (Setup, SETUP, {"max_input_tokens": 0}), (Setup, SETUP, {"long_rows": "x"}),
        (Setup, SETUP, {"plugins": [1]}), (Setup, SETUP, {"target": "x"}),
        (Train, TRAIN, {"round": 0}), (Train, TRAIN, {"round": True}), (Train, TRAIN, {"own": {}}),
        (Train, TRAIN, {"own": {"\n": {}}}), (Train, TRAIN, {"files": {}}), (Train, TRAIN, {"files": {"a": -1}}),
        (Train, TRAIN, {"seconds": float("nan")}), (Train, TRAIN, {"seconds": 1e9}), (Train, TRAIN, {"bundle": None}),
        (Ask, {"messages": {"a": {}}, "bundle": None, "seconds": 1}, {"messages": []}),
        (Greeting, GREETING, {"clients": {}}), (Greeting, GREETING, {"clients": {"a": 0}}),
        (Greeting, GREETING, {"clock": "now"}), (Greeting, GREETING, {"clock": 10**400}),
        (Greeting, GREETING, {"clock": float("nan")}), (Greeting, GREETING, {"converse": 1}),
    ],
)  # fmt: skip
def test_lines_are_checked_field_by_field(kind, whole, change):
    kind.parse(whole)
    with pytest.raises(ClientError, match=next(iter(change))):
        kind.parse({**whole, **change})


def test_what_a_site_says_of_a_failure_is_one_clean_line():
    assert (
        told(refusal("refused", "policy.most_epochs is 3")) == "its policy does not allow it: policy.most_epochs is 3"
    )
    assert told({"error": ["odd"]}) == "it said something unknown"
    assert "\x1b" not in told({"error": "failed", "why": "\x1b[31mred\nrow"})
    assert told({"have": 3}) is None


@pytest.mark.parametrize("name", ["", "A" * 32, "0" * 31, None, "../" + "0" * 29])
def test_a_run_has_a_name_that_is_a_plain_word(name):
    with pytest.raises(ClientError, match="of which run"):
        run_id(name)
