"""Kept folders: what changed in them is named, and a hole of any size is not read."""

import os

import pytest

from fedproxy import sealed
from fedproxy.errors import CheckpointError
from fedproxy.sealed import check_tree, tree_sha256


def test_a_file_that_grew_is_refused_unread(tmp_path, monkeypatch):
    (tmp_path / "proxy").mkdir()
    path = tmp_path / "proxy/model.safetensors"
    path.write_bytes(b"weights")
    known = tree_sha256(tmp_path, "proxy")
    check_tree(tmp_path, known, "proxy")
    os.truncate(path, 1 << 40)  # a hole of 1 TiB
    monkeypatch.setattr(sealed, "file_sha256", lambda path: pytest.fail("it is read"))
    with pytest.raises(CheckpointError, match=r"model.safetensors is not as the run wrote it: it has another SHA-256"):
        check_tree(tmp_path, known, "proxy")


def test_hashes_of_older_runs_without_sizes_still_count(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("{}")
    known = {name: seal.partition(" ")[0] for name, seal in tree_sha256(tmp_path, "a.json").items()}
    check_tree(tmp_path, known, "a.json")
    path.write_text("[]")
    with pytest.raises(CheckpointError, match="another SHA-256"):
        check_tree(tmp_path, known, "a.json")
