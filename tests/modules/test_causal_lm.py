import math

import pytest
import torch

from fedproxy.data.batching import ExampleLoader
from fedproxy.data.tokenisation import Example
from fedproxy.errors import ClientError, ConfigError
from fedproxy.modules.causal_lm import CausalLMModule
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


def make_loader(seed=0, count=12, batch_size=4):
    generator = torch.Generator().manual_seed(9)
    examples = [
        Example(
            tuple(torch.randint(3, 61, (4 + index % 5,), generator=generator).tolist()),
            ((2, 4 + index % 5),),
            str(index),
        )
        for index in range(count)
    ]
    return ExampleLoader(examples, batch_size, pad_id=0, generator=torch.Generator().manual_seed(seed))


def run(trainable, loader, *, epochs=1, accumulate=1, seed=0, **options):
    module = CausalLMModule(trainable.model, lr=1e-2, parameters=trainable.parameters(), **options)
    fit(make_trainer({"accelerator": "cpu"}, max_epochs=epochs, accumulate=accumulate), module, loader, seed=seed)
    return module


def test_fit_equals_a_plain_loop(make_model):
    trainable, twin = make_trainable(make_model), make_trainable(make_model)
    module = run(trainable, make_loader(), epochs=2)
    optimizer = torch.optim.AdamW(list(twin.parameters().values()), lr=1e-2, weight_decay=0.0)
    loader, losses, tokens = make_loader(), [], []
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
    assert module.regularizer_loss == 0.0
    # The last epoch's perplexity weighs tokens, not batches.
    nats = sum(loss * count for loss, count in zip(losses[3:], tokens[3:], strict=True)) / sum(tokens[3:])
    logged = module.trainer.callback_metrics
    assert logged["train/perplexity"].item() == pytest.approx(math.exp(nats), rel=1e-5)
    assert logged["train/task_loss"].item() == pytest.approx(losses[-1], rel=1e-5)
    assert 0 <= logged["train/accuracy"].item() <= 1


@pytest.mark.parametrize("direct", [True, False])
def test_regularizer_gradient_on_a_real_step(make_model, direct):
    trainable = make_trainable(make_model)
    parameters = trainable.parameters()
    anchor = {name: tensor + 0.3 for name, tensor in trainable.state().items()}
    conflict = {name: torch.rand(t.shape, generator=torch.Generator().manual_seed(2)) for name, t in anchor.items()}
    gradients = {}

    class Probe(CausalLMModule):
        def on_before_optimizer_step(self, optimizer):
            super().on_before_optimizer_step(optimizer)
            gradients[self.regularizer is None] = {name: tensor.grad.clone() for name, tensor in self.tuned.items()}

        def on_train_start(self):
            super().on_train_start()
            self._adds_gradient = direct

    start = trainable.state()
    for regularizer in (Conflict(0.5), None):
        trainable.load_state(start)
        module = Probe(
            trainable.model, lr=1e-9, parameters=parameters, regularizer=regularizer, anchor=anchor, conflict=conflict
        )
        fit(make_trainer({"accelerator": "cpu"}, max_epochs=1, accumulate=3), module, make_loader())
        # Eq 9 itself: lambda sum C (phi - phi^t)^2 with phi - phi^t = -0.3.
        wanted = 0.0 if regularizer is None else 0.5 * 0.09 * sum(c.sum().item() for c in conflict.values())
        assert module.regularizer_loss == pytest.approx(wanted, rel=1e-4)
    for name in parameters:
        # d/dphi lambda C (phi - phi^t)^2 = 2 lambda C (phi - phi^t).
        got = gradients[False][name] - gradients[True][name]
        torch.testing.assert_close(got, 2 * 0.5 * conflict[name] * -0.3, rtol=1e-3, atol=1e-5)


def test_regularizer_is_nothing_in_the_first_round(make_model):
    plain, regularised = make_trainable(make_model), make_trainable(make_model)
    run(plain, make_loader())
    module = run(regularised, make_loader(), regularizer=Conflict(1e3), anchor=regularised.state(), conflict=None)
    assert module.regularizer_loss == 0.0
    assert all(torch.equal(plain.state()[name], tensor) for name, tensor in regularised.state().items())


def test_strong_conflict_holds_coordinates_back(make_model):
    trainable = make_trainable(make_model)
    anchor = trainable.state()
    conflict = {name: (torch.arange(t.numel()) % 2).view(t.shape).float() for name, t in anchor.items()}
    module = run(trainable, make_loader(), epochs=4, regularizer=Conflict(1e3), anchor=anchor, conflict=conflict)
    moved = torch.cat([(trainable.state()[name] - anchor[name]).flatten().abs() for name in anchor])
    held = torch.cat([conflict[name].flatten() for name in anchor]) == 1
    assert moved[held].mean() < 0.5 * moved[~held].mean()
    assert module.regularizer_loss > 0
    assert module.anchor is None  # the broadcast is let go
    assert all(parameter.grad is None for parameter in trainable.parameters().values())


def test_accumulated_batches_equal_one_large_batch_of_equal_answers(make_model):
    examples = [Example((1, 2, 3 + index, 4, 5 + index), ((3, 5),), str(index)) for index in range(8)]

    def loader(size):
        return ExampleLoader(examples, size, pad_id=0, generator=torch.Generator().manual_seed(0))

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
        run(trainable, make_loader(), seed=seed)
        assert not trainable.model.training
        states.append(torch.cat([tensor.flatten() for tensor in trainable.state().values()]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])
    assert not torch.equal(states[0], states[3])


def test_validation_measures_the_same_loss(make_model):
    trainable = make_trainable(make_model)
    module = CausalLMModule(trainable.model, lr=1e-3, parameters=trainable.parameters())
    [batch] = list(make_loader(count=4))
    [metrics] = make_trainer({"accelerator": "cpu"}).validate(module, make_loader(count=4), verbose=False)
    assert math.log(metrics["val/perplexity"]) == pytest.approx(trainable.model(**batch).loss.item(), rel=1e-5)


def test_base_weights_get_no_gradient(make_model):
    trainable = make_trainable(make_model)
    run(trainable, make_loader())
    assert all(p.grad is None for name, p in trainable.model.named_parameters() if "lora_" not in name)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_precisions_train_and_clip(make_model, precision):
    trainable = make_trainable(make_model)
    before = trainable.state()
    module = CausalLMModule(trainable.model, lr=1e-2, parameters=trainable.parameters())
    fit(make_trainer({"accelerator": "cpu", "precision": precision}, max_grad_norm=1.0), module, make_loader())
    assert any(not torch.equal(before[name], tensor) for name, tensor in trainable.state().items())
    assert math.isfinite(module.task_loss)


def test_what_a_module_refuses(make_model):
    trainable = make_trainable(make_model)
    state = trainable.state()
    with pytest.raises(ConfigError, match=r"client\.lr must be > 0, got 0"):
        CausalLMModule(trainable.model, lr=0.0)
    with pytest.raises(ConfigError, match=r"client\.weight_decay must be >= 0"):
        CausalLMModule(trainable.model, lr=1.0, weight_decay=-1.0)
    with pytest.raises(ClientError, match="no trainable parameter"):
        CausalLMModule(make_model("llama").requires_grad_(False), lr=1.0)
    first = next(iter(state))
    anchor = {name: tensor for name, tensor in state.items() if name != first}
    with pytest.raises(ClientError, match=f"the broadcast state lacks {first}"):
        CausalLMModule(
            trainable.model, lr=1.0, parameters=trainable.parameters(), regularizer=Conflict(), anchor=anchor
        )


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
