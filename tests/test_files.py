import json
import os
import stat

import pytest

from fedproxy.errors import CheckpointError, DataError, one_line
from fedproxy.files import (
    MOST_JSON_BYTES,
    file_sha256,
    open_regular,
    packed,
    parse_json,
    private_folder,
    read_json,
    read_whole,
    write_bytes,
    write_text,
)


def test_an_equal_text_is_not_written_again(tmp_path):
    path = write_text(tmp_path / "a.json", "x\n")
    before = path.stat()
    write_text(path, "x\n")
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    write_text(path, "y\n")
    assert path.read_text() == "y\n"


@pytest.mark.parametrize(("private", "mode"), [(False, 0o640), (True, 0o600)])
def test_a_file_has_the_mode_that_the_umask_leaves_which_no_other_thread_sees_changed(
    private, mode, tmp_path, monkeypatch
):
    before, asked = os.umask(0o027), []
    try:
        with monkeypatch.context() as patched:
            patched.setattr(os, "umask", asked.append)
            write_text(tmp_path / "a.json", "x", private=private)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == mode
    assert asked == []  # it is the whole process's
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_what_stood_there_stays_when_writing_fails(tmp_path, monkeypatch):
    path = write_text(tmp_path / "a.json", "old\n")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        write_text(path, "new\n")
    assert path.read_text() == "old\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "cannot be read"),
        (b'{"a": ' + b"9" * 400 + b"}", "cannot be read .a number has 400 digits"),
        (b"\xff\xfe{", "not UTF-8"),
        (b'{"a": 1', "not valid JSON"),
        (b"[1]", "must hold an object, got list"),
        (b"true", "must hold an object, got bool"),
    ],
)
def test_odd_json_is_one_line(tmp_path, content, rule):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rule) as caught:
        read_json(path, dict, error=DataError, remedy="write it again")
    assert str(caught.value).endswith("write it again")
    assert "\n" not in str(caught.value)


def test_a_pipe_is_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        open_regular(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_json(tmp_path / "pipe", dict)
    with pytest.raises(OSError, match="not a regular file"):
        file_sha256(tmp_path / "pipe")


def test_a_link_is_followed_only_on_demand(tmp_path):
    (tmp_path / "file").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with pytest.raises(OSError, match=r"symbolic link|too many"):
        open_regular(tmp_path / "link")
    assert read_json(tmp_path / "link", dict) == {}


def test_booleans_are_no_whole_numbers():
    with pytest.raises(ValueError, match="a whole number, got bool"):
        parse_json("true", int)
    assert parse_json(json.dumps([1]), list) == [1]


def test_a_private_folder_is_closed_to_others(tmp_path):
    folder = tmp_path / "server"
    folder.mkdir(mode=0o755)
    assert stat.S_IMODE(private_folder(folder).stat().st_mode) == 0o700
    assert stat.S_IMODE(private_folder(tmp_path / "new").stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m\nline", "red line"),
        ("\x1b]8;;http://x\x07link", "link"),
        ("a\u202eb\u2028c\x00d", "a b c d"),
        ("x" * 20_000_000, "x" * 297 + "..."),
        ("  ", "str"),
        (ValueError(), "ValueError"),
        ("日本 é", "日本 é"),
    ],
)
def test_foreign_text_becomes_one_printable_line(text, shown):
    assert one_line(text) == shown


def test_a_foreign_object_that_cannot_be_shown_is_named_by_its_type():
    class OddError(Exception):
        def __str__(self):
            raise RuntimeError

    assert one_line(OddError()) == "OddError"


def test_a_file_that_is_too_large_to_hold_is_not_read(tmp_path):
    path = tmp_path / "large.json"
    path.write_bytes(b"[]")
    assert read_whole(path, most=2) == b"[]"
    os.truncate(path, MOST_JSON_BYTES + 1)  # takes no room on the disk
    with pytest.raises(OSError, match="it has 268435457 bytes, 268435456 are the most that is read"):
        read_whole(path)
    with pytest.raises(CheckpointError, match=r"large.json cannot be read: it has 268435457 bytes.*; use overwrite"):
        read_json(path, list)


def test_packed_json_is_read_and_bounded(tmp_path, monkeypatch):
    path = write_bytes(tmp_path / "a.json.gz", packed('{"a": [1, 2]}'))
    assert read_json(path, dict) == {"a": [1, 2]}
    for content, reason in (
        (path.read_bytes()[:-9], "the gzip file is cut off"),
        (b'{"a": 1}', "it is not packed by gzip"),
        (packed("[" + "1," * 10**6 + "1]"), "it unpacks to more than 100000 bytes"),
    ):
        path.write_bytes(content)
        monkeypatch.setattr("fedproxy.files.MOST_JSON_BYTES", 100_000)
        with pytest.raises(CheckpointError, match=rf"a.json.gz cannot be read: {reason}.*; use overwrite=true"):
            read_json(path, dict)
