"""Fisher and Gram statistics against plain computations on a small model."""

import pytest
import torch
import torch.nn.functional as F

from fedproxy.data.tokenisation import Example
from fedproxy.strategies.round_parts.statistics import Statistics, client_statistics
from fedproxy.strategies.trainable import Trainable


def make_trainable(make_model, **options):
    trainable = Trainable.by_name("lora")(r=2, modules=["q_proj", "v_proj", "down_proj"], **options).attach(
        make_model("llama")
    )
    rng = torch.Generator().manual_seed(1)
    trainable.load_state({n: 0.1 * torch.randn(t.shape, generator=rng) for n, t in trainable.state().items()})
    return trainable


@pytest.fixture
def examples():
    rng = torch.Generator().manual_seed(2)
    ids = [tuple(torch.randint(3, 61, (length,), generator=rng).tolist()) for length in (7, 4, 5)]
    return [
        Example(row, ((len(row) - answer, len(row)),), str(k))
        for k, (row, answer) in enumerate(zip(ids, (3, 1, 2), strict=True))
    ]


def statistics(trainable, examples, group):
    found = client_statistics([group], trainable, examples, pad_id=0, device=torch.device("cpu"))
    assert list(found) == [group]
    return found[group]


def test_fisher_is_the_mean_squared_gradient_of_each_rows_log_likelihood(make_model, examples):
    trainable = make_trainable(make_model)
    parameters = trainable.parameters()
    wanted = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for example in examples:
        ids = torch.tensor([example.input_ids])
        [(start, end)] = example.spans
        logits = trainable.model(ids).logits[0, start - 1 : -1]
        nll = F.cross_entropy(logits, ids[0, start:end], reduction="sum")
        for name, grad in zip(parameters, torch.autograd.grad(nll, list(parameters.values())), strict=True):
            wanted[name] += grad**2 / 3
    found = statistics(trainable, examples, "fisher")
    assert sorted(found) == sorted(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-7)
    assert all(parameter.grad is None for parameter in parameters.values())


@pytest.mark.parametrize(
    "dropout", [0.0, 0.5]
)  # with dropout layers PEFT's own forward runs, which calls A as a module
def test_gram_is_the_inner_products_of_the_inputs_of_a_and_of_b(make_model, examples, dropout):
    trainable = make_trainable(make_model, dropout=dropout)
    found = statistics(trainable, examples, "gram")
    assert sorted(found) == sorted(trainable.state())
    seen = {}
    layer = trainable.layers()["model.layers.1.self_attn.v_proj"]
    handle = layer.register_forward_pre_hook(lambda _, args: seen.setdefault("x", []).append(args[0][0].detach()))
    with torch.no_grad():
        for example in examples:
            trainable.model(torch.tensor([example.input_ids]))
    handle.remove()
    x = torch.cat(seen["x"])  # (16 tokens, 32)
    assert x.shape == (16, 32)
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_{}.weight"
    torch.testing.assert_close(found[name.format("A")], x.T @ x, rtol=1e-4, atol=1e-4)
    low = x @ trainable.state()[name.format("A")].T
    torch.testing.assert_close(found[name.format("B")], low.T @ low, rtol=1e-4, atol=1e-4)


def test_the_model_goes_on_training(make_model, examples):
    trainable = make_trainable(make_model)
    trainable.model.train()
    statistics(trainable, examples, "fisher")
    assert trainable.model.training


@pytest.mark.parametrize("name", ["lora", "full"])
@pytest.mark.parametrize("group", ["fisher", "gram"])
def test_forms_are_those_of_what_is_sent(make_model, examples, name, group):
    options = {"r": 2} if name == "lora" else {"blocks": [0]}
    trainable = Trainable.by_name(name)(**options).attach(make_model("llama"))
    sent = statistics(trainable, examples, group)
    forms = Statistics((group,)).expects({}, trainable)[group].tensors
    assert {n: (t.shape, t.dtype) for n, t in sent.items()} == {n: (t.shape, t.dtype) for n, t in forms.items()}
    assert sent  # norms have no Gram matrix, linear weights do
