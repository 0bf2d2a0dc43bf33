"""A whole run: what it leaves, what it keeps to itself, and that it is the method it says it is."""

import json
import math
from itertools import chain
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedproxy.config import load_config
from fedproxy.data.assets import resolve
from fedproxy.data.owned_texts import OwnedTexts
from fedproxy.data.tokenisation import tokenise
from fedproxy.evaluation.task_rows import render_rows
from fedproxy.models import LayerMap, load_model, load_tokenizer, state_sha256
from fedproxy.pipeline.data import client_rows, public_texts
from fedproxy.pipeline.plan import plan
from fedproxy.protocol import Broadcast
from fedproxy.strategies.fusion.plug_in import PlugIn

MODES = ("replace", "delta")
ROUND_KEYS = {
    "round", "clients", "train_loss", "regularizer_loss", "heterogeneity", "weights", "retention", "conflict_mean",
    "cosine", "sign_agreement", "kept_density", "update_norms", "factor_mean_error", "upload_bytes", "download_bytes",
    "seconds",
}  # fmt: skip


def test_the_folder_holds_what_the_design_promises(tiny_run):
    _, folder = tiny_run
    names = ["config.yaml", "rounds.jsonl", "report.json", "report.md", "report.html", "partition.json"]
    folders = ["checkpoints/round_0002", "proxy", "adapter", "fused", "server"]
    assert all((folder / name).is_file() for name in names)
    assert all((folder / name).is_dir() for name in folders)
    layer_map = json.loads((folder / "server/layer_map.json").read_text())
    assert len(layer_map["proxy_to_target"]) == 3
    assert layer_map["target_sha256"] == state_sha256(load_model(resolve("asset:tiny-llama")))


def test_report_has_the_schema_and_agrees_with_the_journal(tiny_run):
    _, folder = tiny_run
    report = json.loads((folder / "report.json").read_text())
    assert report["schema_version"] == 1
    assert report["run"]["status"] == "completed"
    assert report["run"]["recipe"] == "fedproxy_tiny"
    assert set(report["scores"]) == {"target", "proxy", "proxy_tuned", "fused"}
    for tasks in report["scores"].values():
        assert set(tasks) == {"tiny_colors", "tiny_sums", "tiny_opposites", "tiny_places", "mean"}
        assert all({"acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "n"} <= set(m) for m in tasks.values())
        assert tasks["tiny_sums"]["n"] == 12
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert [line["round"] for line in rounds] == [1, 2]
    for line, reported in zip(rounds, report["rounds"], strict=True):
        assert set(reported) >= ROUND_KEYS
        assert {key: line[key] for key in ROUND_KEYS} == {key: reported[key] for key in ROUND_KEYS}
    assert report["cost"]["upload_bytes"] == sum(line["upload_bytes"] for line in rounds)
    assert 0 < report["exposure"]["disclosed_parameter_share"] < 1


def test_plan_predicts_parameters_and_bytes_exactly(tiny_run):
    report, _ = tiny_run
    predicted = plan(["recipe=fedproxy_tiny"])
    assert predicted.target_parameters == report.cost.target_parameters
    assert predicted.proxy_parameters == report.cost.proxy_parameters
    assert predicted.trainable_parameters == report.cost.trainable_parameters
    first, second = report.rounds
    assert first.upload_bytes == predicted.upload_bytes * 4
    assert first.download_bytes == predicted.upload_bytes * 4
    assert second.download_bytes == predicted.download_bytes * 4  # state and conflict


def test_regularizer_is_zero_in_the_first_round_only(tiny_run):
    report, _ = tiny_run
    assert report.rounds[0].regularizer_loss == 0
    assert report.rounds[1].regularizer_loss > 0


def test_proxy_and_fused_load_and_generate_with_and_without_cache(tiny_run):
    _, folder = tiny_run
    for name in ("proxy", "fused"):
        model = AutoModelForCausalLM.from_pretrained(folder / name)
        tokenizer = AutoTokenizer.from_pretrained(folder / name)
        ids = tokenizer("Question: How much is one plus one?\nAnswer:", return_tensors="pt")["input_ids"]
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        assert torch.equal(
            model.generate(ids, use_cache=True, **options), model.generate(ids, use_cache=False, **options)
        )


def test_adapter_is_the_final_state_in_peft_format(tiny_run):
    _, folder = tiny_run
    state = load_file(folder / "checkpoints/round_0002/state.safetensors")
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "proxy"), folder / "adapter")
    merged = tuned.merge_and_unload().state_dict()
    fused = AutoModelForCausalLM.from_pretrained(folder / "fused").state_dict()
    kept = json.loads((folder / "server/layer_map.json").read_text())["proxy_to_target"]
    assert any(tensor.any() for name, tensor in state.items() if "lora_B" in name)
    for new, old in enumerate(kept):
        name = "mlp.up_proj.weight"
        assert torch.allclose(fused[f"model.layers.{old}.{name}"], merged[f"model.layers.{new}.{name}"], atol=1e-6)


def test_clients_get_nothing_that_names_the_target_or_the_removed_blocks(tiny_run, tmp_path):
    _, folder = tiny_run
    target = load_model(resolve("asset:tiny-llama"))
    secrets = [
        b"tiny-llama",
        b"tiny_llama",
        state_sha256(target).encode(),
        b"proxy_to_target",
        b"base_model:",
        b"base_model_name",
        b"/cache/",
    ]
    state = load_file(folder / "checkpoints/round_0002/state.safetensors")
    conflict = load_file(folder / "checkpoints/round_0002/conflict.safetensors")
    Broadcast(3, state, {"lr": 1.0}, {"conflict": conflict}).save(tmp_path / "broadcast.safetensors")
    files = [path for path in (folder / "proxy").rglob("*") if path.is_file()]
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= {path.name for path in files}
    for path in [*files, tmp_path / "broadcast.safetensors"]:
        content = path.read_bytes()
        assert not [secret for secret in secrets if secret in content], path


def test_calibration_text_holds_no_clients_row():
    config = load_config(["recipe=fedproxy_tiny"])
    clients = client_rows(config.data, seed=42)
    texts = public_texts(config.compression.calibration, OwnedTexts(chain(*clients.values())), rows=32, seed=42)
    owned = {" ".join((row.prompt + row.target).split()) for own in clients.values() for row in own}
    assert texts
    assert not owned & {" ".join(text.split()) for text in texts}


def test_calibration_that_is_a_clients_row_is_left_out(tmp_path):
    config = load_config(["recipe=fedproxy_tiny", f"compression.calibration.path={tmp_path / 'c.jsonl'}"])
    clients = client_rows(config.data, seed=42)
    row = clients["tiny_sums"][0]
    lines = [
        {"text": f"In other words, {row.prompt}{row.target}"},
        {"text": "This sentence is in public use, no client has it."},
    ]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    texts = public_texts(config.compression.calibration, OwnedTexts(chain(*clients.values())), rows=2, seed=1)
    assert texts == ["This sentence is in public use, no client has it."]


@pytest.mark.parametrize("mode", ["replace", "delta"])
def test_no_rounds_leave_the_target_bit_for_bit(run_tiny, mode):
    _, folder = run_tiny("federation.rounds=0", f"fusion.mode={mode}", "evaluation.models=[]")
    assert state_sha256(load_model(folder / "fused")) == state_sha256(load_model(resolve("asset:tiny-llama")))


def test_same_seed_gives_the_same_scores_losses_and_diagnostics(tiny_run, run_tiny):
    first, _ = tiny_run
    second, _ = run_tiny()
    assert second.scores == first.scores
    for left, right in zip(first.rounds, second.rounds, strict=True):
        for key in ROUND_KEYS - {"seconds"}:
            assert getattr(left, key) == getattr(right, key), key


def test_one_client_one_round_fedavg_is_plain_lora_tuning(run_tiny):
    report, folder = run_tiny(
        "compression.name=none", "data.partition.name=pooled", "federation.rounds=1", "aggregator.name=fedavg",
        "regularizer.name=none", "evaluation.models=[]", "client.lr=0.003",
    )  # fmt: skip
    fused = load_model(folder / "fused").state_dict()
    expected = centralised_reference(folder)
    assert report.rounds[0].clients == ["pooled"]
    assert max(float((fused[name] - expected[name]).abs().max()) for name in expected) < 1e-5


def centralised_reference(folder: Path) -> dict[str, torch.Tensor]:
    """Tune the target with PEFT in a plain loop on the same batches: full logits, torch's own loss and AdamW."""
    from peft import LoraConfig, get_peft_model

    from fedproxy.data.batching import batches, collate
    from fedproxy.seeding import derive_seed, generator

    config = load_config([f"recipe={folder / 'config.yaml'}"])
    tokenizer = load_tokenizer(resolve("asset:tiny-llama"))
    rows = [
        row
        for task in config.data.tasks
        for row in render_rows(task, "train", limit=32, seed=derive_seed(config.seed, "rows", task))
    ]
    examples = tokenise(rows, tokenizer, max_input_tokens=96, max_target_tokens=16)
    base = load_model(resolve("asset:tiny-llama"))
    modules = list(config.trainable.modules)  # type: ignore[attr-defined]
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=modules))
    draw = generator(config.seed, "trainable")
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for name in sorted(named, key=lambda n: n.replace(".default.", ".")):
        if "lora_A" in name:
            torch.nn.init.kaiming_uniform_(named[name], a=math.sqrt(5), generator=draw)
    optimizer = torch.optim.AdamW(named.values(), lr=0.003, weight_decay=0.0)
    order = batches([len(e.input_ids) for e in examples], 8, generator(config.seed, 1, "pooled", "batches"))
    for chosen in order:
        batch = collate([examples[i] for i in chosen], tokenizer.pad_token_id)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
        optimizer.step()
    tuned: dict[str, torch.Tensor] = model.merge_and_unload().state_dict()
    return tuned


def test_strong_conflict_regularizer_holds_disputed_coordinates_back(run_tiny):
    _, folder = run_tiny("federation.rounds=2", "regularizer.strength=1000.0", "evaluation.models=[]")
    conflict = load_file(folder / "checkpoints/round_0001/conflict.safetensors")
    before = load_file(folder / "checkpoints/round_0001/state.safetensors")
    after = load_file(folder / "checkpoints/round_0002/state.safetensors")
    moved = {name: (after[name] - before[name]).abs() for name in before}
    high = torch.cat([moved[name][conflict[name] >= 0.5] for name in moved])
    low = torch.cat([moved[name][conflict[name] == 0] for name in moved])
    assert len(high) > 100
    assert len(low) > 100
    assert high.mean() < 0.5 * low.mean()


@pytest.mark.parametrize(
    ("rule", "space"), [("fedavg", "product"), ("flexlora", "product"), ("ffa_lora", "factors"), ("median", "product")]
)
def test_lora_rules_run_in_their_space(run_tiny, rule, space):
    report, folder = run_tiny(
        f"aggregator.name={rule}", f"federation.space={space}", "regularizer.name=none", "evaluation.models=[]"
    )
    assert len(report.rounds) == 2
    state = load_file(folder / "checkpoints/round_0002/state.safetensors")
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert any(tensor.any() for name, tensor in state.items() if "lora_B" in name)


def test_ffa_lora_trains_b_alone_and_its_mean_of_factors_is_exact(run_tiny):
    report, folder = run_tiny("aggregator.name=ffa_lora", "regularizer.name=proximal", "evaluation.models=[]")
    _, untuned = run_tiny("federation.rounds=0", "evaluation.models=[]")
    start, end = (load_file(run / "adapter/adapter_model.safetensors") for run in (untuned, folder))
    assert all(torch.equal(start[name], end[name]) for name in start if "lora_A" in name)
    assert not any(torch.equal(start[name], end[name]) for name in start if "lora_B" in name)
    assert [line.factor_mean_error for line in report.rounds] == pytest.approx([0, 0], abs=1e-7)


def test_distillation_brings_the_proxy_nearer_and_delta_still_leaves_the_target(run_tiny):
    distil = ("distillation.steps=30", "distillation.rows=32", "distillation.lr=0.001", "federation.rounds=0")
    _, plain = run_tiny("federation.rounds=0", "evaluation.models=[]")
    _, folder = run_tiny(*distil, "fusion.mode=delta", "evaluation.models=[]")
    target = load_model(resolve("asset:tiny-llama"))
    ids = load_tokenizer(resolve("asset:tiny-llama"))("The sky is blue and grass is green.", return_tensors="pt")[
        "input_ids"
    ]
    with torch.no_grad():
        wanted = target(ids).logits.log_softmax(-1)
        kl = [
            float((wanted.exp() * (wanted - load_model(run / "proxy")(ids).logits.log_softmax(-1))).sum(-1).mean())
            for run in (plain, folder)
        ]
    assert kl[1] < 0.8 * kl[0]
    assert state_sha256(load_model(folder / "fused")) == state_sha256(target)
    # What was distilled is kept by the server, bit for bit what a run without distillation sends.
    assert state_sha256(load_model(folder / "server/proxy_undistilled")) == state_sha256(load_model(plain / "proxy"))


def test_healing_brings_the_proxy_nearer_before_distillation_and_delta_still_leaves_the_target(run_tiny, capsys):
    words = ("healing.rows=64", "federation.rounds=0", "evaluation.models=[]", "fusion.mode=delta")
    _, plain = run_tiny("federation.rounds=0", "evaluation.models=[]")
    _, healed = run_tiny(*words)
    assert "healed: error of hidden states behind block " in capsys.readouterr().err
    _, both = run_tiny(*words, "distillation.steps=1", "distillation.rows=32")
    target, tokenizer = (load(resolve("asset:tiny-llama")) for load in (load_model, load_tokenizer))
    ids = tokenizer("The sky is blue and grass is green.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        wanted = target.model(ids).last_hidden_state
        errors = [
            float((load_model(run / "proxy").model(ids).last_hidden_state - wanted).square().mean())
            for run in (plain, healed)
        ]
    assert errors[1] < 0.8 * errors[0]
    assert state_sha256(load_model(healed / "fused")) == state_sha256(target)
    assert state_sha256(load_model(both / "server/proxy_undistilled")) == state_sha256(load_model(healed / "proxy"))


def test_replace_and_delta_can_both_be_formed_from_a_distilled_runs_folder(run_tiny):
    _, folder = run_tiny("distillation.steps=2", "distillation.rows=32", "federation.rounds=1", "evaluation.models=[]")
    target, proxy, undistilled = (
        load_model(path)
        for path in (resolve("asset:tiny-llama"), folder / "proxy", folder / "server/proxy_undistilled")
    )
    layer_map = LayerMap.load(folder / "server/layer_map.json")
    tuned = PeftModel.from_pretrained(load_model(folder / "proxy"), folder / "adapter").merge_and_unload().state_dict()
    replace, delta = (PlugIn(mode=mode).fuse(target, proxy, tuned, layer_map).state_dict() for mode in MODES)
    kept = load_model(folder / "fused").state_dict()  # the recipe's mode is replace
    assert all(torch.allclose(replace[name], kept[name], atol=1e-6) for name in kept)
    moved = [f"model.layers.{old}.mlp.up_proj.weight" for old in layer_map.proxy_to_target]
    for new, name in enumerate(moved):
        own = f"model.layers.{new}.mlp.up_proj.weight"
        distilled = proxy.state_dict()[own] - undistilled.state_dict()[own]
        assert distilled.any()
        torch.testing.assert_close(replace[name] - delta[name], distilled, atol=1e-6, rtol=1e-4)


def test_a_second_run_reads_what_the_target_said_and_distils_the_same_proxy(run_tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDPROXY_CACHE", str(tmp_path / "cache"))
    options = ("distillation.steps=6", "distillation.rows=32", "distillation.cache_teacher=true", "federation.rounds=0")
    _, first = run_tiny(*options, "evaluation.models=[]")
    entries = sorted((tmp_path / "cache/teacher").iterdir())
    stamps = [path.stat().st_ino for path in entries]
    assert [path.suffix for path in entries] == [".safetensors"] * 2  # 32 texts in batches of 16
    _, second = run_tiny(*options, "evaluation.models=[]")
    assert [path.stat().st_ino for path in sorted((tmp_path / "cache/teacher").iterdir())] == stamps
    assert state_sha256(load_model(first / "proxy")) == state_sha256(load_model(second / "proxy"))


def test_loggers_get_every_round(run_tiny):
    _, folder = run_tiny("loggers=[csv,tensorboard]", "evaluation.models=[]")
    header, *lines = (folder / "logs/csv/metrics.csv").read_text().splitlines()
    assert len(lines) == 2
    assert {"round/train_loss", "round/conflict_mean", "weights/tiny_sums"} <= set(header.split(","))
    assert list((folder / "logs/tensorboard").glob("events.out.tfevents.*"))


def test_files_of_ones_own_are_split_by_a_column(run_tiny, tmp_path):
    lines = [
        {"ask": f"Question: {topic} {i}?\nAnswer:", "say": " one", "topic": topic}
        for topic in ("sky", "sea")
        for i in range(20)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    columns = ("data.prompt_column=ask", "data.target_column=say", "data.label_column=topic")
    partition = ("data.partition.name=dirichlet", "data.partition.clients=2", "data.partition.alpha=0.5")
    _, folder = run_tiny(
        "data.tasks=[]", f"data.files.own={tmp_path / 'rows.jsonl'}", "data.rows_per_task=null", *columns, *partition,
        "evaluation.tasks=[tiny_sums]", "federation.rounds=1", "evaluation.models=[]",
    )  # fmt: skip
    content = json.loads((folder / "partition.json").read_text())
    assert sum(len(keys) for keys in content["clients"].values()) == 40
    assert set(content["clients"]) == {"client_00", "client_01"}
    assert content["heterogeneity"]["label"] > 0.05


def test_missing_assets_are_fetched_before_anything_else(run_tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDPROXY_CACHE", str(tmp_path / "cache"))
    report, _ = run_tiny("federation.rounds=0", "evaluation.models=[target]", "evaluation.limit=2")
    assert report.run.status == "completed"
    assert {path.name for path in (tmp_path / "cache").iterdir()} >= {"tiny-llama", "tiny-qa", "tiny-calibration"}
