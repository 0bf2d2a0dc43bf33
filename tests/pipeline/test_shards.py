"""Proxy and fused model in several files: the same tensors, whole in every respect, read by anybody."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from fedproxy.config import load_config
from fedproxy.errors import CheckpointError, ConfigError
from fedproxy.models import load_model
from fedproxy.pipeline.run import run

from .lines import Lines

SMALL = (
    "recipe=fedproxy_tiny",
    "data.tasks=[tiny_sums,tiny_colors]",
    "data.rows_per_task=8",
    "client.batch_size=8",
    "evaluation.limit=2",
    "evaluation.models=[proxy,fused]",
    "federation.rounds=1",
)


def go(folder, *words):
    display = Lines()
    return run(load_config([*SMALL, f"output_dir={folder}", *words]), display), display.lines


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run whose models are one file each, and one whose files have at most 100 kB."""
    folder = tmp_path_factory.mktemp("shards")
    whole, _ = go(folder / "whole")
    parts, _ = go(folder / "parts", "target.max_shard_size=100KB")
    return folder, whole, parts


def test_shards_hold_the_same_tensors_and_an_index_that_is_right(runs):
    folder, whole, parts = runs
    assert parts.scores == whole.scores
    for name in ("proxy", "fused"):
        one, several = folder / "whole" / name, folder / "parts" / name
        assert [path.name for path in one.glob("*.safetensors*")] == ["model.safetensors"]
        shards = sorted(several.glob("model-*.safetensors"))
        assert len(shards) >= 3
        assert not (several / "model.safetensors").exists()
        index = json.loads((several / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == {path.name for path in shards}
        stock, ours = AutoModelForCausalLM.from_pretrained(several), load_model(several)
        state = load_model(one).state_dict()
        assert index["weight_map"].keys() <= state.keys()
        for model in (stock, ours):
            assert model.state_dict().keys() == state.keys()
            assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
        bytes_ = sum(tensor.nbytes for key, tensor in state.items() if key in index["weight_map"])
        assert index["metadata"]["total_size"] == bytes_
        facts = json.loads((folder / "parts/server/facts.json").read_text())["files"]
        assert {f"{name}/{path.name}" for path in several.glob("*.safetensors*")} <= facts.keys()


def test_a_run_goes_on_from_shards_under_another_size_and_leaves_them(runs, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(runs[0] / "parts", folder)
    before = {path: path.read_bytes() for path in folder.glob("proxy/*.safetensors*")}
    (folder / "report.json").unlink()
    report, lines = go(folder, "resume=auto", "federation.rounds=2", "target.max_shard_size=5GB")
    assert report.run.status == "completed"
    assert not [line for line in lines if line.startswith("compressed")]
    assert {path: path.read_bytes() for path in folder.glob("proxy/*.safetensors*")} == before
    assert [path.name for path in folder.glob("fused/*.safetensors*")] == ["model.safetensors"]  # fused anew
    alone, _ = go(tmp_path / "alone", "federation.rounds=2")
    assert alone.scores == report.scores


def test_every_shard_is_looked_at(runs, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(runs[0] / "parts", folder)
    (folder / "report.json").unlink()
    sharded = sorted(folder.glob("fused/model-*"))[1]
    good = sharded.read_bytes()
    sharded.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    _, lines = go(folder, "resume=auto", "target.max_shard_size=100KB")
    assert any(line.startswith(f"fused again: {sharded} is not as the run wrote it") for line in lines)
    assert sharded.read_bytes() == good
    (folder / "report.json").unlink()
    sorted(folder.glob("proxy/model-*"))[1].unlink()
    with pytest.raises(CheckpointError, match=r"proxy/model-00002-of-.*cannot be read"):
        go(folder, "resume=auto")


def test_models_that_a_wrapper_keeps_are_in_parts_too(tmp_path):
    go(tmp_path / "run", "fusion.name=logit_offset", "target.max_shard_size=100KB")
    assert len(list(tmp_path.glob("run/fused/tuned/model-*.safetensors"))) >= 3
    load_model(tmp_path / "run/fused")


def test_a_distilled_proxys_copy_at_the_server_is_in_parts_too(tmp_path):
    words = ("distillation.steps=1", "distillation.rows=4", "federation.rounds=0", "evaluation.models=[]")
    go(tmp_path / "run", *words, "target.max_shard_size=100KB")
    assert len(list(tmp_path.glob("run/server/proxy_undistilled/model-*.safetensors"))) >= 3


@pytest.mark.parametrize("size", ["5", "0GB", "5GiB", "-1MB", "much", "1.5GB"])
def test_a_size_that_is_none_is_refused(tmp_path, size):
    with pytest.raises(ConfigError, match=r"^target\.max_shard_size must be a whole number .*such as 5GB, got"):
        load_config([*SMALL, f"output_dir={tmp_path}", f"target.max_shard_size={size}"])
