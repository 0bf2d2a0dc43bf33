"""What runs share is, to the bit, what each would have made alone; and only where everything agrees."""

import json
from dataclasses import replace

import pytest
import torch

from fedproxy.config import load_config
from fedproxy.data.assets import resolve
from fedproxy.data.partition.rows import ClientRows
from fedproxy.models import load_model, load_tokenizer
from fedproxy.pipeline import reuse
from fedproxy.pipeline.context import Run
from fedproxy.pipeline.data import client_rows
from fedproxy.pipeline.display import Display
from fedproxy.pipeline.folder import RunFolder
from fedproxy.pipeline.reuse import (
    SharedWork,
    evaluation_key,
    file_sha256,
    key_of,
    model_key,
    questions_sha256,
)
from fedproxy.pipeline.run import run
from fedproxy.pipeline.stages.compress import Compress
from fedproxy.pipeline.stages.federate import Federate
from fedproxy.pipeline.validation import held_out

SMALL = (
    "recipe=fedproxy_tiny",
    "data.tasks=[tiny_sums,tiny_colors]",
    "data.rows_per_task=8",
    "evaluation.limit=6",
    "evaluation.models=[target,proxy]",
    "federation.rounds=0",
)


def config(folder, *overrides):
    return load_config([*SMALL, f"output_dir={folder}", *overrides])


def content(folder):
    """Return what the runs may share: the proxy's files, the layer map, samples and scores without times."""
    files = sorted(
        [*(folder / "proxy").iterdir(), folder / "server/layer_map.json", *folder.glob("evaluation/*.jsonl")]
    )
    scores = json.loads((folder / "report.json").read_text())["scores"]
    return {path.name: file_sha256(path) for path in files if path.name != "README.md"}, scores


@pytest.fixture(scope="module")
def three_runs(tmp_path_factory):
    """A run that shares, a second that takes over, and a third alone."""
    folder = tmp_path_factory.mktemp("sharing")
    shared = SharedWork(folder / "shared")
    run(config(folder / "first"), shared=shared)
    run(config(folder / "second", "aggregator.name=fedavg"), shared=shared)
    run(config(folder / "alone", "aggregator.name=fedavg"))
    return folder


def test_a_shared_proxy_and_a_shared_evaluation_have_the_bits_of_fresh_ones(three_runs):
    assert content(three_runs / "second") == content(three_runs / "alone") == content(three_runs / "first")
    (proxy,) = (three_runs / "shared/proxies").iterdir()
    weights = three_runs / "second/proxy/model.safetensors"
    assert weights.stat().st_ino == (proxy / "proxy/model.safetensors").stat().st_ino  # taken over, not made again
    assert len(list((three_runs / "shared/evaluations").iterdir())) == 2  # target and proxy
    facts = [json.loads((three_runs / name / "server/facts.json").read_text()) for name in ("first", "second", "alone")]
    for key in ("target_sha256", "proxy_parameters", "block_scores"):
        assert facts[0][key] == facts[1][key] == facts[2][key]


def test_a_proxy_that_was_changed_is_not_taken_over(three_runs, tmp_path):
    (kept,) = (three_runs / "shared/proxies").iterdir()
    shared = SharedWork(tmp_path / "shared")
    changed = shared.folder / "proxies" / kept.name
    for path in kept.rglob("*"):
        if path.is_file():
            (changed / path.relative_to(kept)).parent.mkdir(parents=True, exist_ok=True)
            (changed / path.relative_to(kept)).write_bytes(path.read_bytes())
    with (changed / "proxy/config.json").open("a") as file:
        file.write(" ")
    run(config(tmp_path / "run", "evaluation.models=[]"), shared=shared)
    assert file_sha256(tmp_path / "run/proxy/config.json") == file_sha256(kept / "proxy/config.json")
    assert file_sha256(changed / "proxy/config.json") == file_sha256(kept / "proxy/config.json")


SCORED = ("federation.validation.every=1", "federation.validation.rows=4")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs that share their rounds and differ in fusion; the second of them by itself too, and one of other rounds."""
    folder, shared = tmp_path_factory.mktemp("federation"), SharedWork(tmp_path_factory.mktemp("shared"))
    half = ("fusion.mode=delta", "fusion.scale=0.5")
    rounds = ("federation.rounds=1", "evaluation.models=[fused]", *SCORED)
    run(config(folder / "whole", *rounds), shared=shared)
    run(config(folder / "half", *rounds, *half), shared=shared)
    run(config(folder / "alone", *rounds, *half))
    run(config(folder / "other", *rounds, *half, "client.lr=0.02"), shared=shared)
    return folder, shared


def test_runs_that_differ_in_fusion_train_once_and_end_as_they_would_alone(trained):
    folder, shared = trained
    weights = {name: file_sha256(folder / name / "fused/model.safetensors") for name in ("whole", "half", "alone")}
    assert weights["half"] == weights["alone"] != weights["whole"]
    adapters = {file_sha256(folder / name / "adapter/adapter_model.safetensors") for name in weights}
    assert len(adapters) == 1
    # Times are those of the training that was done: the lines are the first run's own.
    lines = [(folder / name / "rounds.jsonl").read_text() for name in ("whole", "half", "alone")]
    assert lines[0] == lines[1] != lines[2]
    reports = [json.loads((folder / name / "report.json").read_text()) for name in ("half", "alone")]
    for key in ("trainable_parameters", "upload_bytes", "download_bytes"):
        assert reports[0]["cost"][key] == reports[1]["cost"][key]
    assert reports[0]["scores"] == reports[1]["scores"]
    assert reports[0]["validation"] == reports[1]["validation"]
    scored = [line["validation"] for report in reports for line in report["rounds"]]
    assert scored[0] == scored[1] is not None
    assert len(list((shared.folder / "federations").iterdir())) == 2  # the other learning rate's as well
    other = file_sha256(folder / "other/adapter/adapter_model.safetensors")
    assert other not in adapters


def test_rounds_taken_over_can_be_gone_on_from_and_leave_the_shared_ones_as_they_were(trained, tmp_path):
    folder, shared = trained
    before = {path: file_sha256(path) for path in shared.folder.rglob("*") if path.is_file()}
    more = (
        *SCORED,
        "federation.rounds=2",
        "evaluation.models=[]",
        "fusion.mode=delta",
        "fusion.scale=0.5",
        "resume=auto",
    )
    run(config(folder / "half", *more), shared=shared)
    run(config(folder / "alone", *more))
    one, other = ((folder / name / "adapter/adapter_model.safetensors") for name in ("half", "alone"))
    assert file_sha256(one) == file_sha256(other)
    assert {path: file_sha256(path) for path in before} == before
    shared.clear()
    assert [path.name for path in shared.folder.iterdir()] == ["evaluations"]


def test_a_kill_while_rounds_are_taken_over_leaves_none_of_them(trained, tmp_path, monkeypatch):
    _, shared = trained
    run(config(tmp_path / "first", "federation.rounds=1", "evaluation.models=[]"), shared=shared)
    link, seen = reuse._link, []

    def killed(source, target):
        link(source, target)
        seen.extend([source] * ("checkpoints" in str(target)))
        if len(seen) == 2:
            raise KeyboardInterrupt

    words = (tmp_path / "run", "federation.rounds=1", "evaluation.models=[]", "fusion.mode=delta")
    monkeypatch.setattr(reuse, "_link", killed)
    with pytest.raises(KeyboardInterrupt, match="go on"):
        run(config(*words), shared=shared)
    monkeypatch.undo()
    assert not list((tmp_path / "run/checkpoints").iterdir())
    run(config(*words, "resume=auto"), shared=shared)
    assert not (tmp_path / "run/.taken").exists()
    adapters = {file_sha256(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("first", "run")}
    assert len(adapters) == 1


@pytest.fixture(scope="module")
def target():
    path = resolve("asset:tiny-llama")
    return load_model(path), load_tokenizer(path)


def key_for(folder, target, *overrides, stage=Compress):
    own = config(folder, *overrides)
    current, clients = Run(own, RunFolder(folder), Display()), client_rows(own.data, seed=own.seed)
    current.target = target
    current.note(data_sha256="the same rows")
    current.clients = ClientRows(clients, folder / "rows")
    current.questions = held_out(own, clients)
    return key_of(stage(), current)


def test_the_key_of_a_proxy_changes_with_all_that_could_change_the_proxy(tmp_path, target):
    plain = key_for(tmp_path, target)
    assert key_for(tmp_path / "elsewhere", target, "aggregator.name=ties", "client.lr=0.5", "method=x") == plain
    others = [
        ["seed=43"],
        ["compression.ratio=0.34"],
        ["compression.calibration.rows=31"],
        ["healing.rows=32"],
        ["healing.rows=32", "healing.ridge=0.5"],
        ["distillation.steps=1", "distillation.rows=32"],
        ["distillation.steps=1", "distillation.rows=32", "distillation.lr=0.5"],
        ["target.dtype=bfloat16"],
    ]
    keys = [key_for(tmp_path, target, *words) for words in others]
    assert len({plain, *keys}) == 1 + len(others)


def test_the_key_of_rounds_changes_with_all_that_they_depend_on(tmp_path, target):
    def key(*overrides):
        return key_for(tmp_path, target, "federation.rounds=1", *overrides, stage=Federate)

    plain = key()
    for same in ("fusion.mode=delta", "evaluation.limit=3", "method=x", "output_dir=elsewhere"):
        assert key(same) == plain
    others = [
        ["seed=43"],
        ["compression.ratio=0.34"],
        ["client.lr=0.5"],
        ["federation.rounds=2"],
        ["aggregator.name=fedavg"],
        ["regularizer.name=proximal"],
        ["server_optimizer.name=adam"],
        ["trainable.r=2"],
        ["data.max_input_tokens=9"],
        ["trainer.precision=bf16-mixed"],
        ["trainable.blocks=last", "realignment.name=emulator"],
        ["trainable.blocks=last", "realignment.name=emulator", "realignment.rows=9"],
    ]
    assert len({plain, *(key(*words) for words in others)}) == 1 + len(others)
    (tmp_path / "partition.json").write_text("{}")  # other owners of the same rows
    assert key() != plain


def test_rounds_that_are_scored_are_shared_unless_scores_pick_one(tmp_path, target):
    def key(*overrides):
        return key_for(tmp_path, target, "federation.rounds=1", *overrides, stage=Federate)

    assert key(*SCORED, "fusion.mode=delta") == key(*SCORED) != key()
    assert key(*SCORED, "federation.validation.rows=5") != key(*SCORED)
    fused = (*SCORED, "federation.validation.model=fused")
    assert key(*fused, "fusion.mode=delta") != key(*fused)  # what was scored depends on fusion
    assert key(*SCORED, "federation.validation.select=best") is None


def test_the_key_of_a_model_changes_with_one_weight_its_configuration_or_its_tokenizer(target):
    model, tokenizer = target
    plain = model_key(model, tokenizer)
    weight = next(model.parameters())
    before = weight.data.clone()
    weight.data.view(-1)[0] += 1
    assert model_key(model, tokenizer) != plain
    weight.data.copy_(before)
    assert model_key(model, tokenizer) == plain
    model.config.rms_norm_eps *= 2
    assert model_key(model, tokenizer) != plain
    model.config.rms_norm_eps /= 2
    other = load_tokenizer(resolve("asset:tiny-llama"))
    other.add_tokens(["zzz"])
    assert model_key(model, other) != plain


def test_a_model_of_unknown_code_and_a_task_from_the_hub_are_not_shared(target, tmp_path):
    class Mine(type(target[0])):
        pass

    assert model_key(Mine(target[0].config), target[1]) is None
    assert questions_sha256(["tiny_sums", "lambada_openai"], 0) is None
    current = Run(config(tmp_path), RunFolder(tmp_path), Display())
    settings = {"tasks": ["lambada_openai"], "num_fewshot": 0, "rounds": 0}
    assert evaluation_key(current, *target, settings) is None


def test_the_key_of_an_evaluation_changes_with_its_settings_and_not_with_rounds(target, tmp_path):
    current = Run(config(tmp_path), RunFolder(tmp_path), Display())
    settings = {"tasks": ["tiny_sums"], "num_fewshot": 0, "limit": 6, "seed": 1, "rounds": 0}
    plain = evaluation_key(current, *target, settings)
    assert evaluation_key(current, *target, {**settings, "rounds": 3}) == plain
    for change in ({"tasks": ["tiny_colors"]}, {"num_fewshot": 1}, {"limit": 7}, {"seed": 2}):
        assert evaluation_key(current, *target, {**settings, **change}) != plain
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert evaluation_key(current, *target, settings) != plain  # sums are taken in another order
    finally:
        torch.set_num_threads(threads)
    more = replace(current.config, evaluation=replace(current.config.evaluation, batch_tokens=77))
    assert evaluation_key(replace(current, config=more), *target, settings) != plain
