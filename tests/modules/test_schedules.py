import pytest
import torch
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from fedproxy.errors import ConfigError
from fedproxy.modules.schedules import Schedule

THEIRS = {
    "constant": lambda optimizer, warm, total: get_constant_schedule_with_warmup(optimizer, warm),
    "linear": get_linear_schedule_with_warmup,
    "cosine": get_cosine_schedule_with_warmup,
}
LR = 3e-4


def rates_of(make, steps, lr=LR):
    """Return the rates that a torch scheduler gives its optimiser, step by step."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler, rates = make(optimizer), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("warmup", [0, 1, 7, 0.1, 0.25, 40])
@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_rates_equal_those_of_transformers_to_the_bit(name, warmup):
    rounds, steps = 4, 9
    total = rounds * steps
    schedule = Schedule.by_name(name)(warmup=warmup)
    # 36 steps: a share of 0.1 is 3.6 steps and 0.25 is 9, rounded up as TrainingArguments.get_warmup_steps does.
    warm = {0: 0, 1: 1, 7: 7, 0.1: 4, 0.25: 9, 40: 40}[warmup]
    ours = []
    for number in range(1, rounds + 1):
        factor = schedule.in_round(number, rounds=rounds, steps=steps, lr=LR)
        ours += [LR * factor(step) for step in range(steps)]
    assert ours == rates_of(lambda optimizer: THEIRS[name](optimizer, warm, total), total)
    # Again in each round: every round is the whole schedule over its own steps.
    again = Schedule.by_name(name)(warmup=warmup if warmup >= 1 else 0, over="round")
    factor = again.in_round(3, rounds=rounds, steps=steps, lr=LR)
    wanted = rates_of(lambda optimizer: THEIRS[name](optimizer, again.warmup_steps(steps), steps), steps)
    assert [LR * factor(step) for step in range(steps)] == wanted


def test_a_least_rate_is_where_the_decay_ends():
    schedule = Schedule.by_name("cosine")(warmup=3, min_lr=3e-5)
    factor = schedule.in_round(1, rounds=1, steps=20, lr=LR)
    theirs = rates_of(lambda optimizer: get_cosine_with_min_lr_schedule_with_warmup(optimizer, 3, 20, min_lr=3e-5), 20)
    assert [LR * factor(step) for step in range(20)] == pytest.approx(theirs, rel=1e-12)
    # Linear: half-way between 3e-4 and 3e-5 in the middle.
    linear = Schedule.by_name("linear")(min_lr=3e-5).in_round(1, rounds=1, steps=20, lr=LR)
    assert LR * linear(10) == pytest.approx((3e-4 + 3e-5) / 2)


@pytest.mark.parametrize(
    ("name", "options", "needs"),
    [
        ("constant", {}, False),
        ("constant", {"warmup": 5}, False),
        ("constant", {"warmup": 0.4}, True),
        ("cosine", {}, True),
        ("cosine", {"over": "round"}, False),
    ],
)
def test_which_schedules_depend_on_the_number_of_rounds(name, options, needs):
    schedule = Schedule.by_name(name)(**options)
    assert schedule.needs_rounds is needs
    rates = [[schedule.in_round(2, rounds=rounds, steps=5, lr=1.0)(step) for step in range(5)] for rounds in (2, 4)]
    assert (rates[0] != rates[1]) is needs


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "linear",
            {"warmup": 1.5},
            r"^client\.schedule\.warmup must be a share .* whole number of steps, got 1.5",
        ),
        ("constant", {"warmup": -0.1}, r"client\.schedule\.warmup must be a share .*, got -0.1"),
        ("cosine", {"min_lr": -1.0}, r"client\.schedule\.min_lr must be at least 0, got -1.0"),
    ],
)
def test_what_a_schedule_refuses(name, options, message):
    with pytest.raises(ConfigError, match=message):
        Schedule.by_name(name)(**options)
