"""Private runs end to end: what leaves a client, what is counted, and what a run that goes on may do."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

from fedproxy.config import load_config
from fedproxy.errors import ConfigError, FedProxyError
from fedproxy.pipeline.plan import plan
from fedproxy.pipeline.privacy import promised
from fedproxy.privacy.accounting import Release, spent

BRIEF = ("data.rows_per_task=16", "client.batch_size=8", "evaluation.models=[]", "regularizer.name=none")
DP = ("privacy.delta=1e-5", "privacy.accountant=rdp", "privacy.epsilon=8")
UNITS = ("client", "example")


def records(folder):
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if "seconds" not in key} for line in lines]


def state(folder, round_=2):
    return load_file(folder / f"checkpoints/round_{round_:04d}/state.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def private(run_tiny):
    """Folder of a private run, by unit, run when first asked for."""
    done = {}

    def go(unit):
        if unit not in done:
            done[unit] = run_tiny(*BRIEF, *DP, f"privacy.unit={unit}")
        return done[unit]

    return go


@pytest.mark.parametrize("unit", UNITS)
def test_a_private_run_spends_its_budget_and_tells(private, unit):
    report, folder = private(unit)
    told = report.privacy
    assert (told.unit, told.budget, told.delta, told.accountant) == (unit, 8.0, 1e-5, "rdp")
    assert told.sampling == {"client": "none", "example": "poisson"}[unit]
    assert told.epsilon == records(folder)[-1]["privacy"]["epsilon"]
    assert "losses" in told.withheld
    assert not told.foreseeable
    for page in ("report.md", "report.html"):
        text = (folder / page).read_text()
        assert "Privacy" in text
        assert {"client": "everything of one client", "example": "one row of a client"}[unit] in text
    lines = records(folder)
    assert [line["train_loss"] for line in lines] == [None, None]  # withheld
    assert lines[0]["privacy"]["epsilon"] < lines[1]["privacy"]["epsilon"] <= 8
    noise = lines[1]["privacy"]["noise_multiplier"]
    # A client of 16 rows takes two samples of 8 in each of two rounds; of a whole client there are two looks.
    look = Release(noise, steps=2) if unit == "client" else Release(noise, "poisson", 0.5, steps=4)
    assert lines[1]["privacy"]["epsilon"] == pytest.approx(spent([look], 1e-5, "rdp"), rel=1e-9)
    assert lines[1]["privacy"]["epsilon"] > 7.9
    assert len(list((folder / "rows/.privacy_ledger").glob("*.json"))) == 4
    memory = load_file(folder / "checkpoints/round_0002/privacy.safetensors")
    assert {name: tensor.shape for name, tensor in memory.items()} == dict.fromkeys(lines[0]["clients"], (2, 4))


@pytest.mark.parametrize("unit", UNITS)
def test_a_killed_private_run_goes_on_with_the_same_bits_at_no_cost(private, run_tiny, tmp_path, unit):
    _, whole = private(unit)
    killed = tmp_path / "out"
    shutil.copytree(whole, killed)
    shutil.rmtree(killed / "checkpoints/round_0002")
    for path in killed.rglob("report.*"):
        path.unlink()
    run_tiny(*BRIEF, *DP, f"privacy.unit={unit}", "resume=auto", folder=killed)
    assert same(state(whole), state(killed))
    assert records(whole) == records(killed)
    ledger = next((killed / "rows/.privacy_ledger").glob("*.json"))
    assert len(json.loads(ledger.read_text())["entries"]) == 2  # the second round again, and charged once


def test_a_ledger_that_was_deleted_ends_the_run(private, run_tiny, tmp_path):
    _, whole = private("client")
    killed = tmp_path / "out"
    shutil.copytree(whole, killed)
    shutil.rmtree(killed / "checkpoints/round_0002")
    shutil.rmtree(killed / "rows/.privacy_ledger")
    for path in killed.rglob("report.*"):
        path.unlink()
    with pytest.raises(
        FedProxyError, match=r"holds 0 releases of client 'tiny_\w+', which has made 1; put back a copy"
    ):
        run_tiny(*BRIEF, *DP, "privacy.unit=client", "resume=auto", folder=killed)


def test_a_second_recipe_on_the_same_rows_finds_the_ledger(run_tiny, tmp_path):
    options = (*BRIEF, *DP, "privacy.unit=client", f"privacy.ledger={tmp_path}/ledger")
    run_tiny(*options, folder=tmp_path / "one")
    with pytest.raises(
        FedProxyError, match=r"privacy.epsilon must be above the (8|7.99) that was spent .* got 8; raise"
    ):
        run_tiny(*options, "client.lr=0.02", folder=tmp_path / "two")
    run_tiny(*options, "client.lr=0.02", "privacy.epsilon=16", folder=tmp_path / "three")
    assert 15.9 < records(tmp_path / "three")[-1]["privacy"]["epsilon"] <= 16


def test_a_run_that_goes_on_with_less_noise_is_refused(run_tiny, tmp_path):
    options = (*BRIEF, "privacy.unit=client", "privacy.delta=1e-5", "privacy.accountant=rdp")
    run_tiny(*options, "privacy.noise_multiplier=4", "federation.rounds=1", folder=tmp_path / "out")
    with pytest.raises(FedProxyError, match=r"privacy.noise_multiplier"):
        run_tiny(*options, "privacy.noise_multiplier=2", "resume=auto", folder=tmp_path / "out")


@pytest.mark.parametrize(
    ("unit", "engine"), [("client", "in_process"), ("example", "in_process"), ("example", "workers")]
)
def test_no_noise_and_no_clip_give_the_bits_of_a_run_without_privacy(run_tiny, unit, engine):
    options = (*BRIEF, "aggregator.name=fedavg", f"engine.name={engine}", "engine.threads=1")
    _, plain = run_tiny(*options)
    off = (f"privacy.unit={unit}", "privacy.noise_multiplier=0", "privacy.clip=null")
    _, private = run_tiny(*options, *off)
    assert same(state(plain), state(private))
    assert records(plain) == records(private)


def test_an_update_is_clipped_and_noised_at_the_client_before_any_rule(run_tiny):
    """Noise of 2 * 0.1 on each of 4 clients: the mean's is 0.1 per coordinate, far above the clipped updates'."""
    options = (*BRIEF, "aggregator.name=fedavg", "privacy.unit=client", "privacy.delta=1e-5", "privacy.accountant=rdp")
    _, folder = run_tiny(*options, "privacy.clip=0.1", "privacy.noise_multiplier=2", "federation.rounds=1")
    moved = state(folder, 1)
    noise = torch.cat([tensor.flatten() for name, tensor in moved.items() if "lora_B" in name])  # starts at zero
    count = len(noise)
    assert float(noise.std()) == pytest.approx(0.1, abs=4 * 0.1 / math.sqrt(2 * count))
    assert all(norm == pytest.approx(0.2 * math.sqrt(count_of(moved)), rel=0.05) for norm in norms(folder))


def count_of(tensors):
    return sum(tensor.numel() for tensor in tensors.values())


def norms(folder):
    return records(folder)[0]["update_norms"]


def test_noise_at_the_server_has_the_same_scale_on_the_sum(run_tiny):
    options = (*BRIEF, "aggregator.name=fedavg", "privacy.unit=client", "privacy.delta=1e-5", "privacy.accountant=rdp")
    more = ("privacy.noise_at=server", "privacy.clip=0.1", "privacy.noise_multiplier=2", "federation.rounds=1")
    _, folder = run_tiny(*options, *more)
    noise = torch.cat([tensor.flatten() for name, tensor in state(folder, 1).items() if "lora_B" in name])
    # 2 * 0.1 on the sum of four updates, so 0.05 on their mean.
    assert float(noise.std()) == pytest.approx(0.05, abs=4 * 0.05 / math.sqrt(2 * len(noise)))


@pytest.mark.parametrize("rule", ["scaffold", "local"])
def test_rules_with_memory_see_what_was_released_alone(run_tiny, rule):
    """Control variates are made from the noised update; a client that is merged with nobody is as private."""
    rules = {
        "scaffold": ("regularizer.name=scaffold", "aggregator.name=fedavg", "privacy.unit=client"),
        "local": ("aggregator.name=none", "privacy.unit=example"),
    }
    _, folder = run_tiny(*BRIEF, *DP, *rules[rule])
    assert 7.9 < records(folder)[-1]["privacy"]["epsilon"] <= 8
    if rule == "scaffold":
        variates = load_file(folder / "checkpoints/round_0002/control_variates.safetensors")
        state_ = state(folder)
        assert variates.keys() == state_.keys()


def test_the_budget_counts_the_rows_that_are_trained_on(run_tiny, tmp_path):
    """Of 16 rows half are too long, and samples of 4 are drawn of the rest: they spend more than of all."""
    rows = [{"prompt": f"Color of rose {k}?", "target": "red" if k % 2 else "red " * 60} for k in range(16)]
    (tmp_path / "ward.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("data.tasks=[]", f"data.files.a={tmp_path / 'ward.jsonl'}", "data.long_rows=drop", "federation.rounds=1")
    noise = ("privacy.unit=example", "privacy.noise_multiplier=1", "privacy.delta=1e-5", "privacy.accountant=rdp")
    config = load_config(["recipe=fedproxy_tiny", *BRIEF, *words, *noise, "client.batch_size=4", "privacy.epsilon=100"])
    of_half, of_all = (promised(config, {"a": count}).epsilon for count in (8, 16))
    assert of_half > of_all
    between = (f"privacy.epsilon={(of_half + of_all) / 2}", "client.batch_size=4")
    with pytest.raises(ConfigError, match=rf"privacy.epsilon=.* is less than the {of_half:.3g} that 1 rounds spend"):
        run_tiny(*BRIEF, *words, *noise, *between, folder=tmp_path / "out")
    assert not (tmp_path / "out/proxy").exists()


def test_a_plan_says_what_it_spends_and_how_loud_its_noise_is():
    client = {line[:28].strip(): line[28:] for line in lines("client")}
    parameters = int(client["trained per client"].split()[0].replace(",", ""))
    assert client["privacy"].startswith("epsilon 7.99 at delta 1e-05 for each client, by rdp with no draw counted on")
    noise = float(client["noise against signal"].split()[0])
    ratio = float(client["noise against signal"].split(" it is ")[1].split()[0])
    assert ratio == pytest.approx(noise * math.sqrt(parameters / 4), rel=0.01)  # the mean of four updates
    example = {line[:28].strip(): line[28:] for line in lines("example")}
    assert "Poisson draws" in example["privacy"]
    assert "a step's mean over 8 rows" in example["noise against signal"]
    unknown = {line[:28].strip(): line[28:] for line in lines("example", "data.rows_per_task=null")}
    assert "plan.rows=" in unknown["privacy"]


def lines(unit, *more):
    return str(plan(["recipe=fedproxy_tiny", *BRIEF, *DP, f"privacy.unit={unit}", *more])).splitlines()
