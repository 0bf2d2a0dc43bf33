"""The cache: fetched once, whole or not there, made anew when the catalog changes, one clear line when it cannot be."""

import dataclasses
import json
import multiprocessing
import shutil
from pathlib import Path

import pytest
from safetensors import SafetensorError

from fedproxy import assets
from fedproxy.data.assets import cache_root, cached_path, fetch, is_cached, resolve, store
from fedproxy.errors import AssetError, DataError


@pytest.fixture
def at_hand(small):
    """The small asset with its wheel already in the cache's downloads, as an offline site would put it."""
    folder = small.cache / "downloads"
    folder.mkdir(parents=True)
    shutil.copy(small.path, folder)
    return small


def test_fetch_converts_once_and_then_only_looks(at_hand, monkeypatch):
    assert not is_cached("small")
    path = fetch("small", progress=False)
    assert path == at_hand.cache / "small" / "calibration.jsonl" == cached_path("small")
    assert is_cached("small")
    monkeypatch.setattr(store, "_make", lambda *_: pytest.fail("converted a second time"))
    shutil.rmtree(at_hand.cache / "downloads")
    assert fetch("small", progress=False) == path


def test_terms_are_accepted_before_anything_is_fetched(at_hand, monkeypatch):
    monkeypatch.setattr("fedproxy.data.assets.catalog", lambda: at_hand.catalog)
    at_hand.catalog["small"] = dataclasses.replace(at_hand.asset, terms="https://example.org/terms")
    refusal = (
        r"asset 'small' comes under terms of its own; read https://example\.org/terms, and if you accept them: "
        r"python -m fedproxy\.assets fetch small --accept-terms$"
    )
    with pytest.raises(AssetError, match=refusal):
        resolve("asset:small", progress=False)
    assert assets.main(["fetch", "--all"]) == 0
    assert not is_cached("small")
    assert assets.main(["fetch", "small", "--accept-terms"]) == 0
    assert resolve("asset:small", progress=False) == cached_path("small")


def test_calibration_text_is_context_plus_right_ending_named_by_its_row(at_hand):
    rows = [json.loads(line) for line in fetch("small", progress=False).read_text().splitlines()]
    # conftest's document i: right ending " a bakes." for even i and " b burns." for odd i
    endings = ("a bakes.", "b burns.")
    expected = {f"hellaswag/train/{i}": f"Cooking: Step {i} of the pie. Then {endings[i % 2]}" for i in range(6)}
    assert len(rows) == 4
    assert len({row["key"] for row in rows}) == 4
    assert all(expected[row["key"]] == row["text"] for row in rows)


def test_calibration_text_depends_on_the_seed_alone(at_hand):
    first = fetch("small", progress=False).read_bytes()
    shutil.rmtree(at_hand.cache / "small")
    assert fetch("small", progress=False).read_bytes() == first
    at_hand.catalog["small"] = dataclasses.replace(at_hand.asset, options={"rows": 4, "seed": 43})
    assert fetch("small", progress=False).read_bytes() != first


@pytest.mark.parametrize("damage", ["missing", "cut short", "broken stamp", "older revision"])
def test_a_damaged_or_outdated_copy_is_made_anew(at_hand, damage):
    path = fetch("small", progress=False)
    whole, stamp = path.read_bytes(), path.parent / ".fedproxy-asset.json"
    if damage == "missing":
        path.unlink()
    elif damage == "cut short":
        path.write_bytes(whole[:-1])
    elif damage == "broken stamp":
        stamp.write_text("[]")
    else:
        at_hand.catalog["small"] = dataclasses.replace(at_hand.asset, revision=2)
    assert not is_cached("small")
    assert fetch("small", progress=False).read_bytes() == whole
    assert is_cached("small")


def test_what_is_no_asset_is_not_deleted_for_one(at_hand):
    path = fetch("small", progress=False)
    path.write_bytes(b"")
    (path.parent / "notes.txt").write_text("mine")
    with pytest.raises(AssetError, match=r"asset 'small': .*notes.txt is no part of it and would be deleted; move it"):
        fetch("small", progress=False)
    (path.parent / ".fedproxy-asset.json").unlink()
    with pytest.raises(AssetError, match=r"asset 'small': .*/small is no part of it and would be deleted; move it"):
        fetch("small", progress=False)
    assert (path.parent / "notes.txt").read_text() == "mine"


def test_a_failed_conversion_leaves_nothing_behind(at_hand, monkeypatch):
    def fail(asset, wheel, out):
        (out / "half").write_text("half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(store, "_conversion", lambda _: fail)
    with pytest.raises(AssetError, match=r"asset 'small': no space left under .*FEDPROXY_CACHE to a larger disk"):
        fetch("small", progress=False)
    assert not is_cached("small")
    assert sorted(path.name for path in at_hand.cache.iterdir()) == [".small.lock", "downloads"]


def test_leftovers_of_a_killed_process_are_removed(at_hand):
    stale = at_hand.cache / ".tmp-small.k1lled"
    stale.mkdir()
    (stale / "half").write_text("half")
    other = at_hand.cache / ".tmp-small-other.alive"
    other.mkdir()
    fetch("small", progress=False)
    assert not stale.exists()
    assert other.exists()


def test_a_cache_that_cannot_be_written_says_so(small, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("FEDPROXY_CACHE", str(tmp_path / "file"))
    with pytest.raises(AssetError, match=r"cannot write to .*file .*set FEDPROXY_CACHE to a folder you own"):
        fetch("small", progress=False)


def test_two_processes_share_one_conversion(at_hand):
    context = multiprocessing.get_context("fork")
    with context.Pool(3) as pool:
        paths = pool.map(_fetch_small, range(3))
    assert set(paths) == {str(at_hand.cache / "small" / "calibration.jsonl")}
    assert is_cached("small")


def _fetch_small(_):
    return str(fetch("small", progress=False))


def test_resolve_knows_assets_local_paths_and_nothing_else(at_hand, tmp_path):
    file = at_hand.cache / "small" / "calibration.jsonl"
    assert resolve("asset:small", progress=False) == file
    assert resolve("asset:small/calibration.jsonl", progress=False) == file
    assert resolve(str(tmp_path)) == tmp_path
    assert resolve("HuggingFaceTB/SmolLM2-135M-Instruct") is None
    with pytest.raises(DataError, match=r"asset 'small' holds no 'train\.jsonl'"):
        resolve("asset:small/train.jsonl", progress=False)


def test_the_command_fetches_and_prints_the_path(at_hand, capsys):
    assert assets.main(["fetch", "asset:small"]) == 0
    assert capsys.readouterr().out == f"small: {at_hand.cache / 'small' / 'calibration.jsonl'}\n"


def test_control_c_says_how_to_go_on(at_hand, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "_conversion", lambda _: interrupt)
    assert assets.main(["fetch", "small"]) == 130
    assert "the same command goes on from here" in capsys.readouterr().err
    assert sorted(path.name for path in at_hand.cache.iterdir()) == [".small.lock", "downloads"]


@pytest.mark.parametrize("call", [fetch, is_cached, cached_path, lambda name: resolve(f"asset:{name}")])
def test_an_unknown_asset_names_the_nearest(small, call):
    with pytest.raises(AssetError, match=r"unknown asset 'smal'; did you mean 'small'\?"):
        call("smal")


def test_the_cache_is_the_users_unless_told_otherwise(monkeypatch, tmp_path):
    monkeypatch.delenv("FEDPROXY_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(store.sys, "platform", "linux")
    assert cache_root() == tmp_path / "fedproxy"
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    monkeypatch.setattr(store.sys, "platform", "win32")
    assert cache_root() == tmp_path / "local" / "fedproxy" / "cache"
    monkeypatch.setenv("FEDPROXY_CACHE", str(tmp_path / "mine"))
    assert cache_root() == tmp_path / "mine"
    monkeypatch.setenv("FEDPROXY_CACHE", "~nobody_of_this_name/cache")
    assert cache_root() == Path("~nobody_of_this_name/cache").absolute()
