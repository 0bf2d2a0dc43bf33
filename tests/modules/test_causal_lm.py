import math
import time
from functools import partial

import lightning
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from fedproxy.data.batching import collate
from fedproxy.data.tokenisation import Example
from fedproxy.errors import ClientError, ConfigError
from fedproxy.modules.callbacks import Deadline, Regularize
from fedproxy.modules.causal_lm import CausalLMModule
from fedproxy.modules.datamodule import ExampleDataModule
from fedproxy.modules.metrics import AnswerAccuracy, AnswerPerplexity
from fedproxy.modules.trainer import fit, make_trainer
from fedproxy.strategies.regularizers import Regularizer
from fedproxy.strategies.trainable import Trainable

Conflict = Regularizer.by_name("conflict")


def make_trainable(make_model, family="llama", **options):
    model = make_model(family)
    options = {"modules": ["q_proj", "down_proj"], "r": 2, **options}
    trainable = Trainable.by_name("lora")(**options).attach(model, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    trainable.load_state({n: 0.1 * torch.randn(t.shape, generator=generator) for n, t in trainable.state().items()})
    return trainable


def make_data(seed=0, count=12, batch_size=4):
    generator = torch.Generator().manual_seed(9)
    examples = [
        Example(
            tuple(torch.randint(3, 61, (4 + index % 5,), generator=generator).tolist()),
            ((2, 4 + index % 5),),
            str(index),
        )
        for index in range(count)
    ]
    return ExampleDataModule(examples, batch_size, pad_id=0, generator=torch.Generator().manual_seed(seed))


def run(trainable, data, *, epochs=1, accumulate=1, seed=0):
    module = CausalLMModule(trainable.model, lr=1e-2, parameters=trainable.parameters())
    fit(make_trainer({"accelerator": "cpu"}, max_epochs=epochs, accumulate=accumulate), module, data, seed=seed)
    return module


def test_fit_equals_a_plain_loop(make_model):
    trainable, twin = make_trainable(make_model), make_trainable(make_model)
    module = run(trainable, make_data(), epochs=2)
    optimizer = torch.optim.AdamW(list(twin.parameters().values()), lr=1e-2, weight_decay=0.0)
    loader, losses, tokens = make_data().train_dataloader(), [], []
    for batch in [*loader, *loader]:
        loss = twin.model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        tokens.append((batch["labels"] != -100).sum().item())
    for name, tensor in twin.state().items():
        torch.testing.assert_close(trainable.state()[name], tensor, rtol=1e-4, atol=1e-5)
    assert module.task_loss == pytest.approx(sum(losses) / 6, rel=1e-5)
    # The last epoch's perplexity weighs tokens, not batches.
    nats = sum(loss * count for loss, count in zip(losses[3:], tokens[3:], strict=True)) / sum(tokens[3:])
    logged = module.trainer.callback_metrics
    assert logged["train/perplexity"].item() == pytest.approx(math.exp(nats), rel=1e-5)
    assert logged["train/task_loss"].item() == pytest.approx(losses[-1], rel=1e-5)
    assert 0 <= logged["train/accuracy"].item() <= 1


def regularised(trainable, regularizer, data, conflict=None, anchor=None, epochs=1, accumulate=1):
    """Fit with a regularizer's term and return it."""
    term = Regularize(regularizer, trainable.state() if anchor is None else anchor, conflict)
    module = CausalLMModule(trainable.model, lr=1e-2, parameters=trainable.parameters())
    options = {"max_epochs": epochs, "accumulate": accumulate, "callbacks": [term]}
    fit(make_trainer({"accelerator": "cpu"}, **options), module, data, seed=0)
    return term


def test_regularizer_gradient_on_a_real_step(make_model):
    trainable = make_trainable(make_model)
    anchor = {name: tensor + 0.3 for name, tensor in trainable.state().items()}
    conflict = {name: torch.rand(t.shape, generator=torch.Generator().manual_seed(2)) for name, t in anchor.items()}
    gradients, start = [], trainable.state()

    class Probe(CausalLMModule):
        def on_before_optimizer_step(self, optimizer):
            gradients.append({name: tensor.grad.clone() for name, tensor in self.tuned.items()})

    for strength in (0.5, 0.0):
        trainable.load_state(start)
        term = Regularize(Conflict(strength), anchor, conflict)
        module = Probe(trainable.model, lr=1e-9, parameters=trainable.parameters())
        trainer = make_trainer({"accelerator": "cpu"}, max_epochs=1, accumulate=3, callbacks=[term])
        fit(trainer, module, make_data())
        # Eq 9 itself: lambda sum C (phi - phi^t)^2 with phi - phi^t = -0.3.
        wanted = strength * 0.09 * sum(c.sum().item() for c in conflict.values())
        assert term.mean_loss == pytest.approx(wanted, rel=1e-4)
        logged = trainer.callback_metrics["train/regularizer_loss"].item()
        assert logged == pytest.approx(wanted, rel=1e-4)
    for name in start:
        # d/dphi lambda C (phi - phi^t)^2 = 2 lambda C (phi - phi^t).
        got = gradients[0][name] - gradients[1][name]
        torch.testing.assert_close(got, 2 * 0.5 * conflict[name] * -0.3, rtol=1e-3, atol=1e-5)


def test_regularizer_is_nothing_in_the_first_round(make_model):
    plain, other = make_trainable(make_model), make_trainable(make_model)
    run(plain, make_data())
    assert regularised(other, Conflict(1e3), make_data()).mean_loss == 0.0
    assert all(torch.equal(plain.state()[name], tensor) for name, tensor in other.state().items())


def test_strong_conflict_holds_coordinates_back(make_model):
    trainable = make_trainable(make_model)
    anchor = trainable.state()
    conflict = {name: (torch.arange(t.numel()) % 2).view(t.shape).float() for name, t in anchor.items()}
    term = regularised(trainable, Conflict(1e3), make_data(), conflict, epochs=4)
    moved = torch.cat([(trainable.state()[name] - anchor[name]).flatten().abs() for name in anchor])
    held = torch.cat([conflict[name].flatten() for name in anchor]) == 1
    assert moved[held].mean() < 0.5 * moved[~held].mean()
    assert term.mean_loss > 0
    assert all(parameter.grad is None for parameter in trainable.parameters().values())


def test_a_regularizer_refuses_what_it_cannot_add_to(make_model, monkeypatch):
    trainable = make_trainable(make_model)
    anchor = trainable.state()
    first = next(iter(anchor))
    conflict = {name: torch.ones_like(tensor) for name, tensor in anchor.items()}
    missing = {name: tensor for name, tensor in anchor.items() if name != first}
    with pytest.raises(ClientError, match=f"parameter '{first}' has no anchor"):
        regularised(trainable, Conflict(), make_data(), conflict, missing)
    # Lightning's own FSDP shards in each fit; a single device stands for a strategy that is none of ours here.
    monkeypatch.setattr("fedproxy.modules.callbacks.SingleDeviceStrategy", DDPStrategy)
    with pytest.raises(ConfigError, match=r"trainer\.strategy: SingleDeviceStrategy leaves no gradient to add to; use"):
        regularised(trainable, Conflict(), make_data())


def test_a_deadline_ends_a_fit_after_a_batch(make_model):
    trainable = make_trainable(make_model)
    module = CausalLMModule(trainable.model, lr=1e-2, parameters=trainable.parameters())
    trainer = make_trainer({"accelerator": "cpu"}, callbacks=[Deadline(time.monotonic())])
    with pytest.raises(ClientError, match=r"time is over; raise federation\.round_timeout_s"):
        fit(trainer, module, make_data())
    assert trainer.global_step == 1


def test_a_notebook_needs_a_plain_trainer_alone(make_model, tmp_path):
    trainable = make_trainable(make_model)
    rows = DataLoader(make_data().examples, batch_size=4, collate_fn=partial(collate, pad_id=0))
    module, losses = CausalLMModule(trainable.model, lr=1e-2), []

    class Losses(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            losses.append(outputs["loss"].item())

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}

    def trained(steps):
        options = {"max_steps": steps, "accelerator": "cpu", "callbacks": [Losses()], "default_root_dir": tmp_path}
        trainer = lightning.Trainer(**options, **quiet)
        trainer.fit(module, rows)
        return trainer

    trainer = trained(30)
    assert len(losses) == trainer.global_step == 30
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])  # 3 batches an epoch
    assert module.task_loss == pytest.approx(sum(losses) / 30, rel=1e-6)
    trained(3)
    assert module.task_loss == pytest.approx(sum(losses[30:]) / 3, rel=1e-6)  # of the latest fit


def test_accumulated_batches_equal_one_large_batch_of_equal_answers(make_model):
    examples = [Example((1, 2, 3 + index, 4, 5 + index), ((3, 5),), str(index)) for index in range(8)]

    def loader(size):
        return ExampleDataModule(examples, size, pad_id=0, generator=torch.Generator().manual_seed(0))

    # Every example has two answer tokens, so the mean of two batch means is the mean of all; the batches differ in
    # order only.
    one, two = make_trainable(make_model), make_trainable(make_model)
    run(one, loader(8))
    run(two, loader(4), accumulate=2)
    for name, tensor in one.state().items():
        torch.testing.assert_close(two.state()[name], tensor, rtol=1e-3, atol=1e-5)


def test_dropout_is_on_while_training_seeded_and_off_afterwards(make_model):
    states = []
    for seed, dropout in ((0, 0.5), (0, 0.5), (1, 0.5), (0, 0.0)):
        trainable = make_trainable(make_model, dropout=dropout)
        run(trainable, make_data(), seed=seed)
        assert not trainable.model.training
        states.append(torch.cat([tensor.flatten() for tensor in trainable.state().values()]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])
    assert not torch.equal(states[0], states[3])


def test_validation_measures_the_same_loss(make_model):
    trainable = make_trainable(make_model)
    module = CausalLMModule(trainable.model, lr=1e-3, parameters=trainable.parameters())
    [batch] = list(make_data(count=4).train_dataloader())
    [metrics] = make_trainer({"accelerator": "cpu"}).validate(
        module, make_data(count=4).train_dataloader(), verbose=False
    )
    assert math.log(metrics["val/perplexity"]) == pytest.approx(trainable.model(**batch).loss.item(), rel=1e-5)


def test_base_weights_get_no_gradient(make_model):
    trainable = make_trainable(make_model)
    run(trainable, make_data())
    assert all(p.grad is None for name, p in trainable.model.named_parameters() if "lora_" not in name)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_precisions_train_and_clip(make_model, precision):
    trainable = make_trainable(make_model)
    before = trainable.state()
    module = CausalLMModule(trainable.model, lr=1e-2, parameters=trainable.parameters())
    fit(make_trainer({"accelerator": "cpu", "precision": precision}, max_grad_norm=1.0), module, make_data())
    assert any(not torch.equal(before[name], tensor) for name, tensor in trainable.state().items())
    assert math.isfinite(module.task_loss)


def test_what_a_module_refuses(make_model):
    with pytest.raises(ClientError, match="no trainable parameter"):
        CausalLMModule(make_model("llama").requires_grad_(False), lr=1.0)


def test_perplexity_is_summed_in_the_log_domain():
    metric = AnswerPerplexity()
    # 200 nats (logits [200, 0, 0], target 1) and two of 1 nat: mean 202 / 3.
    metric.update(torch.tensor([200.0]))
    metric.update(torch.tensor([1.0, 1.0]))
    assert metric.mean_nll().item() == pytest.approx(202 / 3, rel=1e-12)
    assert metric.compute().item() == pytest.approx(math.exp(202 / 3), rel=1e-9)


def test_accuracy_counts_tokens():
    metric = AnswerAccuracy()
    metric.update(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([1, 1]))
    metric.update(torch.tensor([[0.0, 1.0]]), torch.tensor([1]))
    assert metric.compute().item() == pytest.approx(2 / 3)
