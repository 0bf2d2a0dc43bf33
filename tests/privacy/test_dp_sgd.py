import math

import pytest
import torch

from fedproxy.data.batching import collate
from fedproxy.data.examples import Example
from fedproxy.errors import ClientError
from fedproxy.federation.client.training import Job, tune
from fedproxy.modules.trainer import fit, make_trainer
from fedproxy.privacy.dp_sgd import PoissonLoader, PrivateLMModule, PrivateTraining, row_losses, sampling_of, steps_of
from fedproxy.privacy.noise import SecretStream
from fedproxy.privacy.row_gradients import RowGradients
from fedproxy.protocol import Broadcast
from fedproxy.seeding import ClientSeeds
from fedproxy.strategies.round_parts import ClientRound
from fedproxy.strategies.trainable import Trainable

SECRET = bytes(range(32))


def examples(count):
    generator = torch.Generator().manual_seed(9)
    ids = [tuple(torch.randint(3, 61, (4 + index % 5,), generator=generator).tolist()) for index in range(count)]
    return [Example(row, ((2, len(row)),), str(index)) for index, row in enumerate(ids)]


def lora(make_model, family="llama", **options):
    options = {"modules": ["q_proj", "k_proj", "down_proj"], "r": 2, **options}
    trainable = Trainable.by_name(options.pop("name", "lora"))(**options).attach(make_model(family))
    generator = torch.Generator().manual_seed(1)
    state = {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in trainable.state().items()}
    trainable.load_state(state)
    return trainable


def single(trainable, example):
    """The gradient of one row alone, by autograd through the model's own code."""
    for parameter in trainable.parameters().values():
        parameter.grad = None
    trainable.model(**collate([example], 0), use_cache=False).loss.backward()
    return {name: own.grad.clone() for name, own in trainable.parameters().items()}


def training(**changes):
    options = {"clip": 0.5, "noise_multiplier": 0.0, "rate": 1.0, "steps": 1, "charged": 100, "physical_batch": 4}
    return PrivateTraining(**{**options, "stream": SecretStream(SECRET, "test"), **changes})


def summed(trainable, rows, clip):
    module = PrivateLMModule(
        trainable.model, training(clip=clip), len(rows), lr=1e-3, parameters=trainable.parameters()
    )
    module.manual_backward = lambda loss: loss.backward()
    for start in range(0, len(rows), module.physical_batch):
        module._add(collate(rows[start : start + module.physical_batch], 0))
    return module._sums


@pytest.mark.parametrize(
    ("family", "options", "by_layer"),
    [
        ("llama", {}, True),
        ("gemma2", {}, True),
        ("gpt2", {"modules": ["c_attn", "c_proj"]}, True),
        ("qwen2", {"name": "bias", "modules": ["q_proj"]}, False),
        ("llama", {"name": "full"}, False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("clip", [0.5, math.inf])
def test_clipped_sums_equal_a_loop_over_single_rows(make_model, family, options, by_layer, clip):
    if options.get("name") in ("bias", "full"):
        options = {"name": options["name"]}
        trainable = Trainable.by_name(options["name"])().attach(make_model(family))
    else:
        trainable = lora(make_model, family, **options)
    trainable.model.double().eval()  # in float32 both sides round, by 1e-6 already
    rows = examples(7)
    wanted = {name: torch.zeros_like(own, dtype=torch.float64) for name, own in trainable.parameters().items()}
    for row in rows:
        gradient = single(trainable, row)
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradient.values()))
        for name, value in gradient.items():
            wanted[name] += value.double() * min(1.0, clip / norm)
    for own in trainable.parameters().values():
        own.grad = None
    assert RowGradients(trainable.model, trainable.parameters()).by_layer is by_layer
    found = summed(trainable, rows, clip)
    norm = math.sqrt(sum(float(value.square().sum()) for value in wanted.values()))
    assert norm > 0.1
    for name, value in wanted.items():
        assert float((found[name].double() - value).norm()) <= 1e-6 * max(1.0, norm), name


def test_a_shared_block_and_recomputed_blocks_keep_the_gradients(make_model):
    trainable = lora(make_model)
    rows = examples(5)
    layers = trainable.model.model.layers
    layers.append(layers[1])  # one block in two places: both passes count
    trainable.model.config.num_hidden_layers = 4
    plain = [single(trainable, row) for row in rows]
    wanted = {name: sum(gradient[name] for gradient in plain if gradient[name] is not None) for name in plain[0]}
    for own in trainable.parameters().values():
        own.grad = None
    found = summed(trainable, rows, math.inf)
    trainable.model.train()
    trainable.model.gradient_checkpointing_enable({"use_reentrant": False})
    again = summed(trainable, rows, math.inf)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(again[name], wanted[name], rtol=1e-4, atol=1e-5)


def test_no_row_pulls_by_more_than_the_clip_and_a_broken_one_not_at_all(make_model):
    trainable = lora(make_model)
    gradients = RowGradients(trainable.model, trainable.parameters())
    with gradients.of(3):
        batch = collate(examples(3), 0)
        logits = trainable.model(input_ids=batch["input_ids"]).logits
        (logits.sum(dim=(1, 2)) * torch.tensor([1e6, math.nan, 1e-9])).sum().backward()
    total = gradients.clipped_sum(0.5)
    # One row far above the clip adds 0.5, one far below next to nothing, the broken one nothing.
    assert math.sqrt(sum(float(g.square().sum()) for g in total.values())) == pytest.approx(0.5, rel=1e-4)


def test_rows_that_meet_in_a_layer_are_refused(make_model):
    trainable = lora(make_model)
    gradients = RowGradients(trainable.model, trainable.parameters())
    packed = {"input_ids": torch.arange(3, 13)[None]}
    said = r"privacy.unit=example needs each row by itself, .* switch packing off"
    with pytest.raises(ClientError, match=said), gradients.of(2):
        trainable.model(**packed)


def test_a_step_is_the_clipped_sum_over_the_expected_rows(make_model):
    """Rate 1 and plain SGD would give sum / n; AdamW's first step is lr times the sign of that."""
    trainable, rows = lora(make_model), examples(6)
    before = trainable.state()
    expected = summed(trainable, rows, 0.5)
    options = training()
    module = PrivateLMModule(trainable.model, options, 6, lr=1e-3, parameters=trainable.parameters())
    fit(make_trainer({"accelerator": "cpu"}), module, PoissonLoader(rows, options, pad_id=0), seed=0)
    assert module.trainer.global_step == 1
    for name, total in expected.items():
        moved, large = trainable.state()[name] - before[name], total.abs() > 1e-5
        assert torch.allclose(moved[large], -1e-3 * total[large].sign(), atol=2e-5)
    assert math.isfinite(module.task_loss)


def test_noise_of_a_step_has_the_stated_variance(make_model):
    """Of 4 rows expected, clip 0.5 and noise 3: standard deviation 3 * 0.5 / 4 = 0.375, mean the plain gradient's."""
    trainable, rows = lora(make_model, r=8), examples(4)
    clean = summed(trainable, rows, 0.5)
    options = training(noise_multiplier=3.0)
    module = PrivateLMModule(trainable.model, options, 4, lr=1e-3, parameters=trainable.parameters())
    seen = {}
    module.optimizers = lambda: type(
        "O",
        (),
        {
            "step": lambda self: seen.update({name: own.grad.clone() for name, own in trainable.parameters().items()}),
            "zero_grad": lambda self: None,
        },
    )()
    module._sums = {name: total.clone() for name, total in clean.items()}
    module.lr_schedulers = lambda: type("S", (), {"step": lambda self: None})()
    module._step()
    noise = torch.cat([(seen[name] - clean[name] / 4).flatten() for name in clean])
    count = len(noise)
    assert count > 3000
    # Four standard errors: of the mean sigma / sqrt(n), of the deviation sigma / sqrt(2 n).
    assert abs(float(noise.mean())) < 4 * 0.375 / math.sqrt(count)
    assert float(noise.std()) == pytest.approx(0.375, abs=4 * 0.375 / math.sqrt(2 * count))


def test_samples_are_poisson_and_an_empty_one_still_steps(make_model):
    rows = examples(200)
    options = training(rate=0.1, steps=400, physical_batch=8)
    sizes, total = [], 0
    for batch in PoissonLoader(rows, options, pad_id=0):
        assert len(batch["input_ids"]) <= 8
        total += len(batch["input_ids"])
        if batch["last"]:
            sizes.append(total)
            total = 0
    sizes = torch.tensor(sizes, dtype=torch.float64)
    assert len(sizes) == 400
    # Binomial(200, 0.1): mean 20, variance 18; four standard errors over 400 draws.
    assert float(sizes.mean()) == pytest.approx(20, abs=4 * math.sqrt(18 / 400))
    assert float(sizes.var()) == pytest.approx(18, abs=4 * 18 * math.sqrt(2 / 400))
    trainable = lora(make_model)
    before = trainable.state()
    never = training(rate=1e-9, steps=3, noise_multiplier=1.0)
    module = PrivateLMModule(trainable.model, never, 10**9, lr=1e-3, parameters=trainable.parameters())
    fit(make_trainer({"accelerator": "cpu"}), module, PoissonLoader(rows[:1], never, pad_id=0), seed=0)
    assert module.trainer.global_step == 3
    assert all(not torch.equal(before[name], tensor) for name, tensor in trainable.state().items())


def test_no_step_is_made_that_was_not_charged(make_model):
    trainable, rows = lora(make_model), examples(6)
    options = training(steps=3, charged=2)
    module = PrivateLMModule(trainable.model, options, 6, lr=1e-3, parameters=trainable.parameters())
    with pytest.raises(ClientError, match=r"a step more than the 2 that the privacy ledger was charged for"):
        fit(make_trainer({"accelerator": "cpu"}), module, PoissonLoader(rows, options, pad_id=0), seed=0)
    again = training(steps=3, charged=2)
    module = PrivateLMModule(trainable.model, again, 6, lr=1e-3, parameters=trainable.parameters())
    fit(make_trainer({"accelerator": "cpu"}, max_steps=2), module, PoissonLoader(rows, again, pad_id=0), seed=0)
    assert module.trainer.global_step == 2


@pytest.mark.parametrize(("number", "over", "mean"), [(1, "round", 0.75), (2, "rounds", 0.375)])
def test_a_schedule_goes_over_the_steps_that_are_made(number, over, mean, make_model):
    """Of 3 samples an epoch max_steps leaves 2: rates 1 and 1/2 in a round, and in round 2 of 2 1/2 and 1/4."""
    trainable, device = lora(make_model), torch.device("cpu")
    broadcast = Broadcast(number, trainable.state())
    task = ClientRound("c", broadcast, trainable, {}, trainable.state(), {}, examples(12), 0, None, device)
    task.training = training(steps=3, charged=2)
    schedule = {"name": "linear", "over": over}
    options = {"batch_size": 4, "accumulate": 1, "epochs": 1, "weight_decay": 0.0, "max_grad_norm": None}
    job = Job(1e-3, **options, regularizer={"name": "none"}, schedule=schedule, rounds=2, max_steps=2)
    tune(task, job, ClientSeeds(1, [2]), {"accelerator": "cpu", "devices": 1})
    assert (task.steps, task.lr) == (2, pytest.approx(mean * 1e-3))


def test_losses_of_rows_and_rates():
    labels = torch.tensor([[-100, 5, 6, -100], [-100, -100, -100, 7], [-100] * 4])
    losses = row_losses(torch.tensor([1.0, 3.0, 10.0]), labels)
    assert losses.tolist() == [2.0, 10.0, 0.0]  # (1 + 3) / 2, 10 / 1, none
    assert sampling_of(100, 16) == (0.16, 7)  # 7 steps of 16 cover 100 rows once on average
    assert sampling_of(10, 16) == (1.0, 1)
    assert (steps_of(7, 3, None), steps_of(7, 3, 10)) == (21, 10)
