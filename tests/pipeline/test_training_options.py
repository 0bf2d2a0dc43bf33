"""Schedules, bounded steps and other optimisers, through whole runs."""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file
from transformers import get_cosine_schedule_with_warmup

from fedproxy.errors import ConfigError
from fedproxy.federation.server.checkpoint import CheckpointFolder

COSINE = ("client.schedule.name=cosine", "client.schedule.warmup=2", "federation.rounds=3", "evaluation.models=[]")


@pytest.fixture
def rates(monkeypatch):
    """The rate of every AdamW step, in order."""
    found = []
    step = torch.optim.AdamW.step

    def noted(self, *args, **kwargs):
        found.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    return found


def state_of(folder, number=3):
    return load_file(folder / f"checkpoints/round_{number:04d}/state.safetensors")


def test_a_killed_and_resumed_run_follows_its_schedule_to_the_bit(run_tiny, tmp_path, rates, monkeypatch):
    report, whole = run_tiny(*COSINE, "client.max_steps=3")
    clients = len(report.rounds[0].clients)
    wanted = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.01)  # the recipe's
    scheduler, theirs = get_cosine_schedule_with_warmup(wanted, 2, 9), []
    for _ in range(9):  # 3 steps in each of 3 rounds
        theirs.append(wanted.param_groups[0]["lr"])
        wanted.step()
        scheduler.step()
    # Every client of a round takes the round's three steps.
    assert rates == [rate for number in range(3) for rate in theirs[3 * number : 3 * number + 3] * clients]

    folder = tmp_path / "killed"
    save = CheckpointFolder.save

    def killed(self, progress, **options):
        save(self, progress, **options)
        if progress.round == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointFolder, "save", killed)
        with pytest.raises(KeyboardInterrupt, match="resume=auto"):
            run_tiny(*COSINE, "client.max_steps=3", folder=folder)
    with pytest.raises(ConfigError, match=r"federation\.rounds is 4, but .* has 3; set it back, or .* goes over all"):
        run_tiny(*COSINE, "client.max_steps=3", "federation.rounds=4", "resume=auto", folder=folder)
    run_tiny(*COSINE, "client.max_steps=3", "resume=auto", folder=folder)
    assert len(rates) == 2 * 9 * clients
    assert rates[9 * clients :] == rates[: 9 * clients]
    first, second = state_of(whole), state_of(folder)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_schedule_in_each_round_lets_rounds_grow(run_tiny, tmp_path):
    each = ("client.schedule.name=linear", "client.schedule.over=round", "evaluation.models=[]", "client.max_steps=2")
    _, whole = run_tiny(*each, "federation.rounds=2")
    _, folder = run_tiny(*each, "federation.rounds=1", folder=tmp_path / "grows")
    run_tiny(*each, "federation.rounds=2", "resume=auto", folder=folder)
    first, second = state_of(whole, 2), state_of(folder, 2)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_control_variates_count_by_the_rates_that_were_taken(run_tiny):
    """One step of plain SGD: c_k+ = -Delta_k / (sum of rates) is the gradient itself, whatever the schedule."""
    found = []
    sgd = ("client.optimizer.name=sgd", "client.max_steps=2", "federation.rounds=1", "evaluation.models=[]")
    rule = ("regularizer.name=scaffold", "aggregator.name=fedavg", "client.max_grad_norm=null", "client.lr=1e-6")
    for more in ((), ("client.schedule.name=constant", "client.schedule.warmup=2")):
        _, folder = run_tiny(*sgd, *rule, *more)
        [path] = sorted((folder / "checkpoints/round_0001").glob("*control*"))
        found.append(load_file(path))
    # With rates 0 and lr / 2 the second gradient counts alone, and at a rate of 1e-6 it is that of the start: of the
    # same size as the mean of two, where a division by 2 lr would make it a fourth.
    sizes = [torch.cat([tensor.flatten() for tensor in group.values()]).norm().item() for group in found]
    assert 0.5 < sizes[0] / sizes[1] < 2


def test_packed_clients_train_as_others_do(run_tiny, tmp_path):
    for name in ("a", "b"):  # rows of 1 to 20 words, whose batches cannot be of one length
        rows = [{"prompt": " ".join(["red"] * (1 + 7 * i % 20)), "target": f" {name} {i % 3}"} for i in range(16)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = ("data.tasks=[]", f"data.files.a={tmp_path}/a.jsonl", f"data.files.b={tmp_path}/b.jsonl")
    brief = (*sources, "federation.rounds=1", "evaluation.models=[]", "client.batch_size=8", "evaluation.tasks=[]")
    states = [state_of(run_tiny(*brief, *more)[1], 1) for more in ((), ("client.packing=true",))]
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=0, atol=2e-3)  # of steps of 1e-2
    assert any(not torch.equal(states[0][name], states[1][name]) for name in states[0])  # rows were packed


class Noting(Callback):
    """Notes what it sees of a fit, below the Trainer's root."""

    def on_train_end(self, trainer, module):
        text = "\n".join(type(own).__name__ for own in trainer.callbacks)
        (Path(trainer.default_root_dir) / "noted.txt").write_text(text)


def test_own_callbacks_ride_with_every_client_and_all_is_written_into_the_run_folder(run_tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    brief = ("federation.rounds=1", "evaluation.models=[]", "client.max_steps=2")
    own = (f"trainer.callbacks=[{__name__}.Noting]", "trainer.profiler=simple", "trainer.logger=csv")
    report, folder = run_tiny(*brief, *own)
    roots = list((folder / "logs/trainer").glob("*/round_0001"))
    assert len(roots) == len(report.rounds[0].clients)
    for root in roots:
        assert (root / "noted.txt").read_text().split() == ["Regularize", "Tell", "Noting"]
        assert {"fit-profile.txt", "metrics.csv"} <= {path.name for path in root.iterdir()}
    assert not list(tmp_path.iterdir())  # nothing in the working folder
