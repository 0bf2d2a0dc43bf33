"""Rules that need more than an update per round run end to end, and a killed run that goes on has the same bits."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from fedproxy.config import load_config
from fedproxy.pipeline.checks import check_components
from fedproxy.pipeline.plan import plan

ROUNDS = 3
BRIEF = ("data.rows_per_task=8", "client.batch_size=4", "evaluation.models=[]", "regularizer.name=none")
RULES = {
    "scaffold": ("regularizer.name=scaffold", "aggregator.name=fedavg", "federation.clients_per_round=3"),
    "feddyn": (
        "regularizer.name=feddyn",
        "server_optimizer.name=feddyn",
        "server_optimizer.share=0.75",
        "aggregator.name=fedavg",
        "aggregator.weighting=uniform",
        "federation.clients_per_round=3",
    ),
    "fedex_lora": ("aggregator.name=fedex_lora", "federation.space=product"),
    "flora": ("aggregator.name=flora", "federation.space=product", "federation.clients_per_round=3"),
    "fedsa_lora": ("aggregator.name=fedsa_lora", "federation.clients_per_round=3"),
    "fisher": ("aggregator.name=fisher",),
    "regmean": ("aggregator.name=regmean",),
}


def tensors(folder, round_):
    files = sorted((folder / f"checkpoints/round_{round_:04d}").glob("*.safetensors"))
    files += sorted((folder / "checkpoints/clients").rglob(f"*_{round_:04d}.safetensors"))
    files += [folder / "fused/model.safetensors", folder / "adapter/adapter_model.safetensors"]
    return {f"{path.relative_to(folder)}/{name}": tensor for path in files for name, tensor in load_file(path).items()}


def records(folder):
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if "seconds" not in key} for line in lines]


@pytest.fixture(scope="module")
def both(run_tiny, tmp_path_factory):
    """Folders of a whole run and of one killed in its last round that went on, by rule, run when first asked for."""
    done = {}

    def go(rule):
        if rule not in done:
            options = (*BRIEF, *RULES[rule], f"federation.rounds={ROUNDS}")
            _, whole = run_tiny(*options)
            killed = tmp_path_factory.mktemp("killed") / "out"
            shutil.copytree(whole, killed)
            _undo_the_last_round(killed)
            run_tiny(*options, "resume=auto", folder=killed)
            done[rule] = whole, killed
        return done[rule]

    return go


def _undo_the_last_round(folder):
    """Leave what a run leaves that was killed late in its last round: the clients' files, but no checkpoint."""
    shutil.rmtree(folder / f"checkpoints/round_{ROUNDS:04d}")
    shutil.rmtree(folder / "fused")
    (folder / "report.json").unlink()
    for client in (folder / "checkpoints").glob("clients/*"):
        (client / f"round_{ROUNDS:04d}.part7").write_bytes(b"half")


@pytest.mark.parametrize("rule", RULES)
def test_the_plan_predicts_the_bytes(both, rule):
    folder, _ = both(rule)
    options = (*BRIEF, *RULES[rule], f"federation.rounds={ROUNDS}")
    predicted = plan(["recipe=fedproxy_tiny", *options]).traffic
    for number, line in enumerate(records(folder), start=1):
        assert (line["upload_bytes"], line["download_bytes"]) == (predicted.all_up(), predicted.all_down(number))


@pytest.mark.parametrize("rule", RULES)
def test_a_run_that_goes_on_is_bit_identical_to_one_that_did_not_stop(both, rule):
    whole, resumed = both(rule)
    left, right = tensors(whole, 3), tensors(resumed, 3)
    assert sorted(left) == sorted(right)
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert records(whole) == records(resumed)


def test_scaffold_keeps_a_variate_per_client_and_their_mean_change_at_the_server(both):
    folder, _ = both("scaffold")
    shared = load_file(folder / "checkpoints/round_0003/control_variates.safetensors")
    latest = [sorted(client.iterdir())[-1] for client in (folder / "checkpoints/clients").iterdir()]
    variates = [load_file(path) for path in latest]
    # c starts at 0 and gains sum(change of c_k) / 4 each round, so it is the mean of the c_k, absent clients' being 0
    for name, value in shared.items():
        total = sum(own[f"control_variates/{name}"] for own in variates)
        torch.testing.assert_close(value, total / 4, rtol=1e-4, atol=1e-6)
    first, second, _ = records(folder)
    state = sum(t.numel() * 4 for t in load_file(folder / "checkpoints/round_0003/state.safetensors").values())
    assert first["upload_bytes"] == 3 * 2 * state  # update and change of the variate
    assert (first["download_bytes"], second["download_bytes"]) == (3 * state, 3 * 2 * state)


def test_the_share_of_feddyn_is_that_of_the_clients_that_are_drawn(tmp_path):
    options = [*BRIEF, *RULES["feddyn"], "federation.min_clients=2", f"output_dir={tmp_path}"]
    check_components(load_config(["recipe=fedproxy_tiny", *options]))  # three of four, whatever may be dropped


def test_a_factor_that_rests_stays_under_server_momentum(run_tiny):
    rules = ("aggregator.name=rolora", "server_optimizer={name: sgd, momentum: 0.9}")
    _, folder = run_tiny(*BRIEF, *rules, "federation.rounds=3")
    second, third = (load_file(folder / f"checkpoints/round_{n:04d}/state.safetensors") for n in (2, 3))
    assert all(torch.equal(second[name], third[name]) == ("lora_A" in name) for name in second)


def test_fedex_lora_and_flora_move_the_target_alike_in_the_first_round(run_tiny):
    # Both are exact: after one round either has added s times the mean of B_k A_k, the one as mean factors plus a
    # residual, the other as stacked factors.
    fused = []
    for rule in ("fedex_lora", "flora"):
        _, folder = run_tiny(*BRIEF, f"aggregator.name={rule}", "federation.space=product", "federation.rounds=1")
        fused.append(load_file(folder / "fused/model.safetensors"))
    for name, weight in fused[0].items():
        torch.testing.assert_close(weight, fused[1][name], rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(weight, fused[1][name]) for name, weight in fused[0].items())


def test_flora_starts_every_round_with_an_empty_adapter_and_all_clients_get_the_change(both):
    folder, _ = both("flora")
    state = load_file(folder / "checkpoints/round_0003/state.safetensors")
    assert all(float(tensor.abs().max()) == 0.0 for name, tensor in state.items() if "lora_B" in name)
    size = sum(t.numel() * 4 for t in state.values())
    change = load_file(folder / "checkpoints/frozen_changes/round_0001.safetensors")
    moved = sum(t.numel() * 4 for t in change.values())
    assert moved == 3 * size  # three clients' factors stacked
    assert [line["download_bytes"] for line in records(folder)] == [
        3 * size,
        3 * size + 4 * moved,
        3 * size + 4 * moved,
    ]


@pytest.mark.parametrize("rule", ["fedex_lora", "flora"])
def test_proxy_and_adapter_are_the_tuned_proxy(both, rule):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, _ = both(rule)
    layers = json.loads((folder / "server/layer_map.json").read_text())["proxy_to_target"]
    proxy = AutoModelForCausalLM.from_pretrained(folder / "proxy")
    tuned = PeftModel.from_pretrained(proxy, folder / "adapter").merge_and_unload().state_dict()
    fused = load_file(folder / "fused/model.safetensors")
    changed = 0
    for name, weight in tuned.items():
        if ".layers." not in name:
            continue
        head, rest = name.split(".layers.")
        index, rest = rest.split(".", 1)
        goal = fused[f"{head}.layers.{layers[int(index)]}.{rest}"]
        torch.testing.assert_close(weight, goal, rtol=1e-5, atol=1e-5)
        changed += not torch.equal(weight, load_file(folder / "proxy/model.safetensors")[name])
    assert changed > 0


def test_fedsa_lora_sends_a_alone_and_fuses_the_mean_of_the_clients_b(both):
    folder, _ = both("fedsa_lora")
    adapter = load_file(folder / "adapter/adapter_model.safetensors")
    half = sum(t.numel() * 4 for name, t in adapter.items() if "lora_A" in name)
    assert all(line["upload_bytes"] == line["download_bytes"] == 3 * half for line in records(folder))
    latest = [sorted(client.iterdir())[-1] for client in (folder / "checkpoints/clients").iterdir()]
    kept = [load_file(path) for path in latest]
    for name, value in adapter.items():
        if "lora_B" in name:  # equal clients (8 rows each): the plain mean
            torch.testing.assert_close(value, sum(own[f"personal/{name}"] for own in kept) / len(kept))
            assert not torch.equal(kept[0][f"personal/{name}"], kept[1][f"personal/{name}"])
    report = json.loads((folder / "report.json").read_text())
    last = len(kept) * sum(t.numel() * 4 for name, t in adapter.items() if "lora_B" in name)
    assert report["cost"]["upload_bytes"] == 9 * half + last


@pytest.mark.parametrize("rule", ["fisher", "regmean"])
def test_statistics_are_sent_and_counted(both, rule):
    folder, _ = both(rule)
    state = sum(t.numel() * 4 for t in load_file(folder / "checkpoints/round_0003/state.safetensors").values())
    line = records(folder)[0]
    assert line["download_bytes"] == 4 * state
    assert line["upload_bytes"] > 4 * state
    if rule == "fisher":
        assert line["upload_bytes"] == 8 * state
