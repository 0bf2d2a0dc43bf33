"""The main job on SmolLM2 and real data, with small budgets: compress, two rounds, fuse, lm-eval."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from fedproxy.config import load_config
from fedproxy.data.assets import resolve
from fedproxy.models import load_model, state_sha256
from fedproxy.pipeline.run import run

pytestmark = pytest.mark.real_model

BUDGET = ("data.rows_per_task=4", "client.batch_size=2", "federation.rounds=2", "evaluation.limit=2")
CALIBRATION = "compression.calibration.rows=16"


@pytest.fixture(scope="module")
def llama_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama") / "run"
    return run(load_config(["recipe=fedproxy_llama", *BUDGET, CALIBRATION, f"output_dir={folder}"])), folder


def test_report_of_the_main_job(llama_run):
    report, _ = llama_run
    assert report.run.status == "completed"
    assert report.rounds[0].clients == ["arc_easy", "csqa", "openbookqa", "socialiqa"]
    assert report.cost.target_parameters == 134_515_008
    assert report.cost.proxy_parameters == 106_194_240  # 22 of 30 blocks, 3,540,096 parameters each
    assert report.scores["fused"]["mean"]["n"] == 8
    assert any("4-bit" in note for note in report.notes)
    assert report.rounds[1].regularizer_loss > 0
    # more than a step per client: A has moved too, so that the mean of factors is not the factors of the mean
    assert 0 < report.rounds[1].factor_mean_error < 1


def test_least_influential_blocks_were_removed(llama_run):
    _, folder = llama_run
    kept = json.loads((folder / "server/layer_map.json").read_text())["proxy_to_target"]
    # blocks 12-17, 25 and 26 have the lowest influence on 64 rows; 16 rows may swap one at the border
    assert len(kept) == 22
    assert len({12, 13, 14, 15, 16, 17, 25, 26} - set(kept)) >= 7
    assert {0, 1, 24, 29} <= set(kept)


def test_fused_differs_from_the_target_in_kept_blocks_alone(llama_run):
    _, folder = llama_run
    target, fused = load_model(resolve("asset:smollm2-135m")), load_model(folder / "fused")
    kept = json.loads((folder / "server/layer_map.json").read_text())["proxy_to_target"]
    own, new = target.state_dict(), fused.state_dict()
    moved = {int(name.split(".")[2]) for name in own if not torch.equal(own[name], new[name])}
    assert moved == set(kept)
    assert state_sha256(fused) != state_sha256(target)


def test_nothing_in_the_proxy_names_the_target(llama_run):
    _, folder = llama_run
    target_hash = json.loads((folder / "server/layer_map.json").read_text())["target_sha256"].encode()
    for path in (folder / "proxy").rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert b"smollm" not in content.lower(), path
        assert b"huggingface" not in content.lower(), path
        assert target_hash not in content, path


def test_proxy_generates_the_same_with_and_without_cache(llama_run):
    _, folder = llama_run
    model = AutoModelForCausalLM.from_pretrained(folder / "proxy")
    ids = torch.tensor([[19556, 28, 638, 359]])
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, use_cache=True, **options), model.generate(ids, use_cache=False, **options))
