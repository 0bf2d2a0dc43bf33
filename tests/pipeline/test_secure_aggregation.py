"""Secure sums end to end: the same merged update as in the clear, and what the server receives."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import chisquare

from fedproxy.config import load_config
from fedproxy.errors import ClientError, ConfigError, FedProxyError
from fedproxy.federation.client.site import Site
from fedproxy.federation.server import participation
from fedproxy.pipeline.checks import check_components
from fedproxy.privacy.keys import Identity, Occasion
from fedproxy.privacy.secure_sum import step_of
from fedproxy.strategies.round_parts.sign_sums import SignSums

BRIEF = ("data.rows_per_task=16", "client.batch_size=8", "evaluation.models=[]", "federation.rounds=2")
SECURE = "privacy.secure_aggregation=true"
RULES = {
    "fedavg": ("aggregator.name=fedavg", "regularizer.name=none"),
    "weighted": ("aggregator.name=fedavg", "regularizer.name=none", "data.weights.tiny_sums=0.5"),
    "task_arithmetic": ("aggregator.name=task_arithmetic", "regularizer.name=none"),
    "ffa_lora": ("aggregator.name=ffa_lora", "regularizer.name=none"),
    "scaffold": (
        "aggregator.name=fedavg",
        "aggregator.weighting=uniform",
        "regularizer.name=scaffold",
        "privacy.largest=4",
    ),
}


def tensors(folder, round_=2):
    files = sorted((folder / f"checkpoints/round_{round_:04d}").glob("*.safetensors"))
    return {f"{path.stem}/{name}": tensor for path in files for name, tensor in load_file(path).items()}


def records(folder):
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


@pytest.fixture
def received(monkeypatch):
    """Every update as it comes through the server's door."""
    seen = []
    admit = participation.admit

    def note(answer, form, vault):
        update = admit(answer, form, vault)
        seen.append(update)
        return update

    monkeypatch.setattr(participation, "admit", note)
    return seen


@pytest.mark.parametrize("rule", RULES)
def test_the_merged_update_is_that_of_a_run_in_the_clear(run_tiny, rule, received):
    _, clear = run_tiny(*BRIEF, *RULES[rule], "federation.rounds=1")
    received.clear()
    _, secure = run_tiny(*BRIEF, *RULES[rule], "federation.rounds=1", SECURE)
    plain, hidden = tensors(clear, 1), tensors(secure, 1)
    assert plain.keys() == hidden.keys()
    largest = max(float(tensor.abs().max()) for name, tensor in plain.items() if name.startswith("state/"))
    for name, tensor in plain.items():
        assert float((tensor - hidden[name]).abs().max()) <= 2e-6 * max(largest, float(tensor.abs().max())), name
    check_received(received)


def check_received(received):
    """Nothing of a single update can be seen: its bytes are uniform, and its figures those of everybody."""
    assert len(received) == 4
    for update in received:
        values = [update.delta, *update.extras.values()]
        whole = torch.cat([group[name].reshape(-1) for group in values for name in group])
        assert whole.dtype == torch.int32
        seen = np.bincount(whole.numpy().view(np.uint8), minlength=256)
        assert chisquare(seen).pvalue > 1e-4
        assert (update.num_examples, update.num_tokens, update.train_loss) == (1, 0, None)


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_ties_elects_signs_from_the_sum_as_it_does_in_the_clear(run_tiny, scope, received):
    """AdamW's first steps have one size, so that some sums are nothing but rounding: there either sign may win."""
    rule = ("aggregator.name=ties", f"aggregator.trim_scope={scope}", "regularizer.name=none", "federation.rounds=1")
    _, clear = run_tiny(*BRIEF, *rule)
    trimmed = [SignSums(0.2, scope).reply(None, update) for update in received]
    received.clear()
    _, secure = run_tiny(*BRIEF, *rule, SECURE)
    check_received(received)
    plain, hidden, open_, total = tensors(clear, 1), tensors(secure, 1), 0, 0
    assert plain.keys() == hidden.keys()
    largest = max(float(tensor.abs().max()) for tensor in plain.values())
    for name, tensor in plain.items():
        off = (tensor - hidden[name]).abs() > 2e-6 * largest
        summed = sum(update.delta[name.removeprefix("state/")].double() for update in trimmed)
        assert not bool((off & (summed.abs() > 4 * step_of(1.0, 4))).any()), name
        open_, total = open_ + int(off.sum()), total + off.numel()
    assert open_ < 1e-3 * total


def test_a_missing_client_voids_the_sum_and_the_round_is_repeated_without_it(run_tiny, monkeypatch):
    train = Site.train

    def fails(self, broadcast, client_id, **options):
        if broadcast.round == 2 and client_id == "tiny_places":
            raise ClientError("out of power")
        return train(self, broadcast, client_id, **options)

    monkeypatch.setattr(Site, "train", fails)
    _, folder = run_tiny(*BRIEF, *RULES["fedavg"], SECURE, "federation.min_clients=2")
    _, clear = run_tiny(*BRIEF, *RULES["fedavg"], "federation.min_clients=2")
    last = records(folder)[-1]
    assert last["clients"] == ["tiny_colors", "tiny_opposites", "tiny_sums"]
    assert set(last["dropped"]) == {"tiny_places"}
    for name, tensor in tensors(clear).items():
        assert float((tensor - tensors(folder)[name]).abs().max()) < 1e-4, name


def test_a_client_that_is_missing_ends_the_attempt_at_once(run_tiny, monkeypatch):
    """The sum is void without it, so that nobody trains for it any more."""
    trained, train = [], Site.train

    def fails(self, broadcast, client_id, **options):
        trained.append((broadcast.round, client_id))
        if broadcast.round == 2 and client_id == "tiny_colors":  # the first
            raise ClientError("out of power")
        return train(self, broadcast, client_id, **options)

    monkeypatch.setattr(Site, "train", fails)
    run_tiny(*BRIEF, *RULES["fedavg"], SECURE, "federation.min_clients=2")
    second = [client for round_, client in trained if round_ == 2]
    assert second == ["tiny_colors", "tiny_opposites", "tiny_places", "tiny_sums"]


@pytest.mark.parametrize("minimum", ["null", "2"])
def test_a_key_that_is_forged_or_replayed_costs_its_own_client_the_round(run_tiny, monkeypatch, minimum):
    share = Identity.share

    def replayed(self, occasion, own):
        if self.client_id == "tiny_sums" and occasion.round == 2:
            occasion = Occasion(occasion.run, 1, occasion.attempt)
        return share(self, occasion, own)

    monkeypatch.setattr(Identity, "share", replayed)
    options = (*BRIEF, *RULES["fedavg"], SECURE, f"federation.min_clients={minimum}")
    said = "key share of client 'tiny_sums' is not signed by its registered key for round 2"
    if minimum == "null":
        with pytest.raises(FedProxyError, match=f"client 'tiny_sums' failed in round 2: .*{said}"):
            run_tiny(*options)
        return
    _, folder = run_tiny(*options)
    assert list(records(folder)[1]["dropped"]) == ["tiny_sums"]
    assert said in records(folder)[1]["dropped"]["tiny_sums"]


def test_clients_that_came_with_one_share_are_both_left_out(run_tiny, monkeypatch):
    share = Identity.share

    def copied(self, occasion, own):
        return share(self, occasion, bytes(31) + b"\1" if self.client_id in ("tiny_sums", "tiny_places") else own)

    monkeypatch.setattr(Identity, "share", copied)
    _, folder = run_tiny(*BRIEF, *RULES["fedavg"], SECURE, "federation.min_clients=2", "federation.rounds=1")
    assert set(records(folder)[0]["dropped"]) == {"tiny_sums", "tiny_places"}
    assert "it has the key share of client 'tiny_places'" in records(folder)[0]["dropped"]["tiny_sums"]


def test_a_client_masks_one_set_of_values_under_a_share(run_tiny, monkeypatch):
    """A server that asks again with no learning would see the update as the difference of the two answers."""
    train, said = Site.train, []

    def asked_again(self, broadcast, client_id, **options):
        first = train(self, broadcast, client_id, **options)
        again = train(self, broadcast, client_id, **options)  # as after an answer that was lost
        assert all(torch.equal(first.delta[name], again.delta[name]) for name in first.delta)
        with pytest.raises(ClientError) as refused:
            train(self, replace(broadcast, job={**broadcast.job, "lr": 1e-9}), client_id, **options)
        said.append(str(refused.value))
        return first

    monkeypatch.setattr(Site, "train", asked_again)
    run_tiny(*BRIEF, *RULES["fedavg"], SECURE, "federation.rounds=1")
    assert len(said) == 4
    assert all("has masked other values with this key share" in line for line in said)


def test_a_repeated_sum_costs_the_budget_nothing(run_tiny, monkeypatch):
    """All are charged for the first attempt, which is void; the second has what they released then."""
    train = Site.train

    def fails(self, broadcast, client_id, **options):
        if broadcast.round == 2 and client_id == "tiny_sums":  # the last
            raise ClientError("out of power")
        return train(self, broadcast, client_id, **options)

    monkeypatch.setattr(Site, "train", fails)
    budget = ("privacy.unit=client", "privacy.delta=1e-5", "privacy.epsilon=8", "privacy.accountant=rdp")
    options = (*BRIEF, *RULES["fedavg"], SECURE, *budget, "privacy.clip=0.01", "federation.min_clients=2")
    _, folder = run_tiny(*options)
    assert 7.9 < records(folder)[-1]["privacy"]["epsilon"] <= 8
    for ledger in (folder / "rows/.privacy_ledger").glob("*.json"):
        assert len(json.loads(ledger.read_text())["entries"]) == (1 if "sums" in ledger.name else 2)


def test_noise_and_masks_go_together(run_tiny):
    options = ("privacy.unit=client", "privacy.delta=1e-5", "privacy.epsilon=8", "privacy.accountant=rdp")
    more = ("privacy.clip=0.01", "privacy.largest=1")
    _, folder = run_tiny(*BRIEF, *RULES["fedavg"], SECURE, *options, *more)
    assert 7.9 < records(folder)[-1]["privacy"]["epsilon"] <= 8


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["aggregator.name=ties", "aggregator.vote=weighted", "regularizer.name=none"],
            r"'ties' needs each client's update with these options and cannot run under secure aggregation; use one of "
            r".*fedavg.*, or ties with vote=uniform and divisor=count",
        ),
        (["aggregator.name=ties", "aggregator.divisor=weight", "regularizer.name=none"], r"'ties' needs each client's"),
        (["aggregator.name=h_ties", "regularizer.name=none"], r"'h_ties' needs each client's update"),
        (["aggregator.name=krum", "regularizer.name=none"], r"'krum' needs each client's update"),
        (["aggregator.name=fedavg", "regularizer.name=conflict"], r"needs the signs of each client's update"),
        (["aggregator.name=fedavg", "regularizer.name=none", "federation.space=product"], r"federation.space must be"),
        (["aggregator.name=fedavg", "regularizer.name=none", "parts.precision.up=int8"], r"parts.precision changes"),
        (
            ["aggregator.name=fedavg", "aggregator.weighting=tokens", "regularizer.name=none"],
            r"aggregator.weighting must be examples or uniform with privacy.secure_aggregation",
        ),
        (
            ["aggregator.name=fedavg", "regularizer.name=none", "federation.clients_per_round=1"],
            r"privacy.secure_aggregation needs at least 2 clients in a round",
        ),
    ],
)
def test_rules_that_need_single_updates_are_refused_before_any_work(overrides, said):
    with pytest.raises(ConfigError, match=said):
        check_components(load_config(["recipe=fedproxy_tiny", SECURE, *overrides]))
