"""Secure sums end to end: the same merged update as in the clear, and what the server receives."""

import json

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
    assert len(received) == 4
    for update in received:
        values = [update.delta, *update.extras.values()]
        whole = torch.cat([group[name].reshape(-1) for group in values for name in group])
        assert whole.dtype == torch.int32
        seen = np.bincount(whole.numpy().view(np.uint8), minlength=256)
        assert chisquare(seen).pvalue > 1e-4
        assert (update.num_examples, update.num_tokens, update.train_loss) == (1, 0, None)


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


def test_a_key_that_is_forged_or_replayed_ends_the_round_and_names_whose(run_tiny, monkeypatch):
    share = Identity.share

    def replayed(self, occasion):
        if self.client_id == "tiny_sums" and occasion.round == 2:
            occasion = Occasion(occasion.run, 1, occasion.attempt)
        return share(self, occasion)

    monkeypatch.setattr(Identity, "share", replayed)
    with pytest.raises(
        FedProxyError, match=r"key share of client 'tiny_sums' is not signed .* an earlier one sent again"
    ):
        run_tiny(*BRIEF, *RULES["fedavg"], SECURE)


def test_noise_and_masks_go_together(run_tiny):
    options = ("privacy.unit=client", "privacy.delta=1e-5", "privacy.epsilon=8", "privacy.accountant=rdp")
    more = ("privacy.clip=0.01", "privacy.largest=1")
    _, folder = run_tiny(*BRIEF, *RULES["fedavg"], SECURE, *options, *more)
    assert 7.9 < records(folder)[-1]["privacy"]["epsilon"] <= 8


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["aggregator.name=ties", "regularizer.name=none"], r"'ties' needs each client's update and cannot run under"),
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
