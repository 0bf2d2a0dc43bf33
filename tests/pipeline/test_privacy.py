"""Private runs end to end: what leaves a client, what is counted, and what a run that goes on may do."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from fedproxy.config import load_config
from fedproxy.errors import ClientError, ConfigError, FedProxyError
from fedproxy.federation.client import site
from fedproxy.federation.client.site import Site
from fedproxy.names import file_stem
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
    assert {name: tensor.shape for name, tensor in memory.items()} == {
        f"client/{name}": (2, 4) for name in lines[0]["clients"]
    }


@pytest.mark.parametrize("rule", ["fedsa_lora", "none"])
def test_a_killed_private_run_whose_clients_keep_tensors_goes_on_with_the_same_bits(run_tiny, tmp_path, rule):
    """Personal tensors are those of the release, though nobody trains; every client has its own."""
    options = (*BRIEF, *DP, "privacy.unit=example", f"aggregator.name={rule}")
    _, whole = run_tiny(*options, folder=tmp_path / "whole")
    killed = tmp_path / "out"
    shutil.copytree(whole, killed)
    shutil.rmtree(killed / "checkpoints/round_0002")
    for path in killed.rglob("report.*"):
        path.unlink()
    run_tiny(*options, "resume=auto", folder=killed)
    assert records(whole) == records(killed)
    kept = [path.relative_to(whole) for path in whole.glob("checkpoints/**/*.safetensors")]
    files = [path for path in kept if "round_0002" in str(path)]
    assert len([path for path in files if path.parts[1] == "clients"]) == 4
    assert all(same(load_file(whole / path), load_file(killed / path)) for path in files)


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


@pytest.fixture
def asked_again(monkeypatch):
    """Have every client of the second round asked twice more: by a server that changed the proxy, and one that lies."""
    answers = {}
    train = Site.train

    def thrice(self, broadcast, client_id, **options):
        first = train(self, broadcast, client_id, **options)
        if broadcast.round < 2:
            return first
        weight = self.model.model.get_input_embeddings().weight
        before = weight.detach().clone()
        with torch.no_grad():
            weight.zero_()
        other_proxy = train(self, broadcast, client_id, **options)
        with torch.no_grad():
            weight.copy_(before)
        lied = replace(broadcast, job={**broadcast.job, "weight_decay": 1e-6})
        answers[client_id] = first, other_proxy, train(self, lied, client_id, **options)
        return first

    monkeypatch.setattr(Site, "train", thrice)
    return answers


def noise_of(update):
    return torch.cat([update.delta[name].reshape(-1) for name in sorted(update.delta)])


@pytest.mark.parametrize("unit", UNITS)
def test_no_two_answers_of_a_client_share_noise(run_tiny, asked_again, unit):
    """A second answer under the first one's noise would show their difference, and so the update itself."""
    options = ("privacy.noise_multiplier=4", "privacy.delta=1e-5", "privacy.accountant=rdp", f"privacy.unit={unit}")
    _, folder = run_tiny(*BRIEF, *options)
    assert len(asked_again) == 4
    for client, (first, other_proxy, lied) in asked_again.items():
        assert torch.equal(noise_of(first), noise_of(other_proxy))  # what was released, and no training
        together = torch.stack([noise_of(first), noise_of(lied)])
        assert abs(float(torch.corrcoef(together)[0, 1])) < {"client": 0.1, "example": 0.5}[unit]
        ledger = json.loads((folder / f"rows/.privacy_ledger/{file_stem(client)}.json").read_text())
        assert [entry["round"] for entry in ledger["entries"]] == [1, 2, 2]  # two requests, two charges
        assert all("noise" not in entry for entry in ledger["entries"])  # released: nobody draws it again
        releases = list((folder / f"rows/.privacy_ledger/releases/{file_stem(client)}").iterdir())
        assert len(releases) == 2  # that of the round before, and the last of this one


def test_a_release_that_is_damaged_is_made_again_and_charged_again(private, run_tiny, tmp_path, caplog):
    options = ("privacy.noise_multiplier=4", "privacy.delta=1e-5", "privacy.accountant=rdp", "privacy.unit=client")
    _, whole = run_tiny(*BRIEF, *options, folder=tmp_path / "out")
    before = state(whole)
    shutil.rmtree(whole / "checkpoints/round_0002")
    for path in [*whole.rglob("report.*"), *whole.rglob("releases/*/round_0001.safetensors")]:
        path.unlink()
    run_tiny(*BRIEF, *options, "resume=auto", folder=whole)
    assert "round 2 is charged again" in caplog.text
    for ledger in (whole / "rows/.privacy_ledger").glob("*.json"):
        assert len(json.loads(ledger.read_text())["entries"]) == 3
    assert not same(before, state(whole))  # other noise


@pytest.mark.parametrize("unit", UNITS)
def test_a_round_that_was_killed_before_its_release_is_charged_once(private, run_tiny, tmp_path, monkeypatch, unit):
    _, whole = private(unit)
    tune = site.tune

    def killed(task, *rest, **options):
        update = tune(task, *rest, **options)
        if task.broadcast.round == 2 and task.client_id == "tiny_sums":
            raise ClientError("killed")
        return update

    with monkeypatch.context() as patched:
        patched.setattr(site, "tune", killed)
        with pytest.raises(FedProxyError, match="failed in round 2"):
            run_tiny(*BRIEF, *DP, f"privacy.unit={unit}", folder=tmp_path / "out")
    run_tiny(*BRIEF, *DP, f"privacy.unit={unit}", "resume=auto", folder=tmp_path / "out")
    assert records(whole)[1]["privacy"] == records(tmp_path / "out")[1]["privacy"]
    for ledger in (tmp_path / "out/rows/.privacy_ledger").glob("*.json"):
        assert len(json.loads(ledger.read_text())["entries"]) == 2


def test_a_round_repeated_with_noise_at_the_server_gives_the_same_bits(run_tiny, tmp_path):
    more = ("privacy.unit=client", "aggregator.name=fedavg", "privacy.noise_at=server")
    _, whole = run_tiny(*BRIEF, *DP, *more, folder=tmp_path / "out")
    before = state(whole)
    shutil.rmtree(whole / "checkpoints/round_0002")
    for path in whole.rglob("report.*"):
        path.unlink()
    run_tiny(*BRIEF, *DP, *more, "resume=auto", folder=whole)
    assert same(before, state(whole))


def test_a_client_that_lowers_its_noise_is_dropped_and_the_run_goes_on(run_tiny, monkeypatch):
    train = Site.train

    def quieter(self, broadcast, client_id, **options):
        update = train(self, broadcast, client_id, **options)
        said = update.extras["privacy"]["release"].clone()
        if client_id == "tiny_sums":
            said[0] *= float("nan") if broadcast.round == 1 else 0.5
        return replace(update, extras={"privacy": {"release": said}})

    monkeypatch.setattr(Site, "train", quieter)
    _, folder = run_tiny(*BRIEF, *DP, "privacy.unit=client", "federation.min_clients=2", "federation.rounds=1")
    assert "finite, got NaN" in records(folder)[0]["dropped"]["tiny_sums"]

    def later(self, broadcast, client_id, **options):
        if broadcast.round == 1:
            return train(self, broadcast, client_id, **options)
        return quieter(self, broadcast, client_id, **options)

    monkeypatch.setattr(Site, "train", later)
    _, folder = run_tiny(*BRIEF, *DP, "privacy.unit=client", "federation.min_clients=2")
    assert records(folder)[1]["dropped"]["tiny_sums"].startswith("it added noise ")


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
