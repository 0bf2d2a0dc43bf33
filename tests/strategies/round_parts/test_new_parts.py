"""Ranks of clients' own, precision on the wire, clipping and noise: each through its whole trip."""

from dataclasses import replace

import pytest
import torch

from fedproxy.config import load_config
from fedproxy.errors import ClientError, ConfigError
from fedproxy.pipeline.run import run
from fedproxy.protocol import Broadcast, ClientUpdate, nbytes
from fedproxy.seeding import ClientSeeds
from fedproxy.strategies.aggregators import Aggregation
from fedproxy.strategies.round_parts import ClientRound, Group, RoundResult, chain, described
from fedproxy.strategies.round_parts.clip_noise import ClipNoise, clip
from fedproxy.strategies.round_parts.conflict_map import ConflictMap
from fedproxy.strategies.round_parts.precision import Precision
from fedproxy.strategies.round_parts.ranks import Ranks

A, B = "m.lora_A.weight", "m.lora_B.weight"


class Model:
    """Stands in for a trainable model: its parameters' shapes alone count."""

    def __init__(self, shapes):
        self.shapes = shapes

    def parameters(self):
        return {name: torch.zeros(shape) for name, shape in self.shapes.items()}


def state(rank=4, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return {A: torch.randn(rank, 70, generator=draw), B: torch.randn(6, rank, generator=draw)}


def task(broadcast, client="c", **fields):
    shapes = {name: tuple(tensor.shape) for name, tensor in state().items()}
    defaults = {"memory": {}, "examples": (), "pad_id": 0, "base": None, "device": torch.device("cpu")}
    return ClientRound(client, broadcast, Model(shapes), {}, dict(broadcast.state), **{**defaults, **fields})


def result(updates):
    return RoundResult(1, len(updates), Broadcast(1, {}), updates, Aggregation({}))


# ---- ranks


def test_a_client_of_rank_two_gets_and_sends_two_rows_of_a_and_two_columns_of_b():
    part, whole = Ranks({"c": 2}), state()
    sent = part.send(Broadcast(2, whole, {}, {"conflict": state(seed=1)}), {})
    got = sent.addressed_to("c")
    assert {name: tuple(t.shape) for name, t in got.state.items()} == {A: (2, 70), B: (6, 2)}
    assert torch.equal(got.state[A], whole[A][:2])
    assert tuple(got.extras["conflict"][B].shape) == (6, 2)
    assert sent.addressed_to("other").state is whole
    # 2 of 4 ranks: half of the bytes of state and conflict map
    assert got.bytes * 2 == sent.addressed_to("other").bytes
    one = task(got)
    for step in reversed(chain([ConflictMap(), part])):
        step.receive(one)
    assert torch.equal(one.state[B], torch.cat([whole[B][:, :2], torch.zeros(6, 2)], dim=1))
    assert {tuple(t.shape) for t in one.conflict.values()} == {(4, 70), (6, 4)}
    update = part.reply(one, ClientUpdate("c", {A: torch.ones(4, 70), B: torch.ones(6, 4)}))
    assert {name: tuple(t.shape) for name, t in update.delta.items()} == {A: (2, 70), B: (6, 2)}
    forms = {"delta": Group({name: t.to("meta") for name, t in whole.items()})}
    expected = part.expects(forms, None, "c")["delta"].tensors
    assert {n: t.shape for n, t in expected.items()} == {n: t.shape for n, t in update.delta.items()}
    assert part.expects(forms, None, "other") is forms


def test_no_client_is_told_the_ranks_of_others():
    assert described(Ranks({"ward-a": 2, "ward-b": 3}, pad=True)) == {"name": "ranks"}


def test_padding_fills_up_with_zeros():
    update = ClientUpdate("c", {A: torch.ones(2, 70), B: torch.ones(6, 2)})
    full = Ranks({"c": 2}, pad=True).take(update, Broadcast(2, state()))
    assert torch.equal(full.delta[A], torch.cat([torch.ones(2, 70), torch.zeros(2, 70)]))
    assert torch.equal(full.delta[B], torch.cat([torch.ones(6, 2), torch.zeros(6, 2)], dim=1))
    assert Ranks({"c": 2}).take(update, Broadcast(2, state())) is update


def test_factors_beyond_a_clients_rank_get_no_gradient():
    """Zero rows of A and zero columns of B stay zero, which makes the whole model's LoRA one of the client's rank."""
    a, b = (tensor.clone() for tensor in state().values())
    a[2:], b[:, 2:] = 0.0, 0.0
    a.requires_grad_(), b.requires_grad_()
    optimizer = torch.optim.AdamW([a, b], lr=0.1, weight_decay=0.1)
    for step in range(5):
        x = torch.randn(3, 70, generator=torch.Generator().manual_seed(step))
        (x @ a.T @ b.T).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not a[2:].any()
    assert not b[:, 2:].any()
    assert a[:2].any()


@pytest.mark.parametrize(("ranks", "rule"), [({"c": 0}, "at least 1"), ({"c": -1}, "at least 1")])
def test_ranks_below_one_are_refused(ranks, rule):
    with pytest.raises(ConfigError, match=rf"parts\.ranks\.clients must be ranks of {rule}"):
        Ranks(ranks)


def test_a_state_of_a_higher_rank_than_the_models_is_refused():
    with pytest.raises(ClientError, match=r"shape \(5, 70\) does not fit into \(4, 70\); train at most"):
        Ranks({"c": 2}).receive(task(Broadcast(1, state(rank=5))))


# ---- precision


@pytest.mark.parametrize(("precision", "most"), [("float32", 0.0), ("bf16", 2**-8), ("int8", 0.02)])
def test_state_and_update_survive_the_trip(precision, most):
    part, whole = Precision(up=precision, down=precision), state()
    sent = part.send(Broadcast(1, whole), {})
    one = task(sent)
    part.receive(one)
    assert all(tensor.dtype == torch.float32 for tensor in one.state.values())
    for name, tensor in whole.items():
        assert float((one.state[name] - tensor).abs().max()) <= most * float(tensor.abs().max())
    assert all(torch.equal(part.seen(sent).state[name], one.state[name]) for name in whole)
    update = part.reply(one, ClientUpdate("c", state(seed=2)))
    back = part.take(update, sent)
    for name, tensor in state(seed=2).items():
        assert float((back.delta[name] - tensor).abs().max()) <= most * float(tensor.abs().max())


def test_bytes_of_int8_with_a_packed_conflict_map_are_those_of_its_forms():
    part, whole = Precision(up="int8", down="int8"), state()
    kept = part.collect({}, result([ClientUpdate(str(k), {}) for k in range(4)]))
    conflict = {name: torch.ones_like(tensor) for name, tensor in whole.items()}
    sent = part.send(Broadcast(2, whole, {}, {"conflict": conflict}), kept)
    n = {A: 280, B: 24}
    # A byte a value and a float32 for each 64; of 4 clients 3 levels, so 2 bits a value; 2 bytes say how many clients.
    assert sent.bytes == sum(v + 4 * -(-v // 64) + v // 4 for v in n.values()) + 2
    update = part.reply(task(sent), ClientUpdate("c", state(seed=2)))
    forms = part.expects({"delta": Group({name: t.to("meta") for name, t in whole.items()})}, None)
    assert nbytes(forms["delta"].tensors) + nbytes(forms["precision"].tensors) == update.bytes
    for group, tensors in (("delta", update.delta), ("precision", update.extras["precision"])):
        wanted = {name: (t.shape, t.dtype) for name, t in forms[group].tensors.items()}
        assert {name: (t.shape, t.dtype) for name, t in tensors.items()} == wanted


def test_the_conflict_map_arrives_to_the_bit():
    draw = torch.Generator().manual_seed(5)
    agreement = {n: torch.randint(3, t.shape, generator=draw) * 2.0 for n, t in state().items()}  # of 4 clients
    conflict = {name: (agreement[name] * -0.25).add_(1.0) for name in agreement}
    part = Precision(down="bf16")
    kept = part.collect({}, result([ClientUpdate(str(k), {}) for k in range(4)]))
    one = task(part.send(Broadcast(2, state(), {}, {"conflict": conflict}), kept))
    part.receive(one)
    assert all(torch.equal(one.broadcast.extras["conflict"][name], conflict[name]) for name in conflict)
    assert "precision" not in one.broadcast.extras


def test_what_rounding_loses_goes_into_the_next_update():
    """The same small update every round: int8 alone rounds it to 0 beside a large value, feedback lets it through."""
    exact = {A: torch.full((4, 70), 1e-3), B: torch.ones(6, 4)}
    exact[A][0, 0] = 1.0
    sums = {}
    for feedback in (True, False):
        part, memory, total = Precision(up="int8", feedback=feedback), {}, torch.zeros(4, 70)
        for _ in range(50):
            one = task(Broadcast(1, state()), memory=memory)
            update = part.reply(one, ClientUpdate("c", exact))
            total += part.take(update, one.broadcast).delta[A]
            memory = one.kept
        sums[feedback] = total[0, 1]
    assert float(sums[True]) == pytest.approx(0.05, abs=0.008)  # 50 * 1e-3, and what is still on the way
    assert float(sums[False]) == 0.0


def test_what_was_lost_of_a_tensor_that_rests_waits_until_it_trains():
    part, exact = Precision(up="int8"), {A: torch.full((4, 70), 0.3), B: torch.zeros(6, 4)}
    lost = {A: torch.zeros(4, 70), B: torch.full((6, 4), 0.25)}
    one = task(Broadcast(2, state(), {"frozen": [B]}), memory={"precision": lost})
    update = part.take(part.reply(one, ClientUpdate("c", exact)), one.broadcast)
    assert not update.delta[B].any()
    assert torch.equal(one.kept["precision"][B], lost[B])
    after = task(Broadcast(3, state(), {"frozen": [A]}), memory=one.kept)
    update = part.take(part.reply(after, ClientUpdate("c", {**exact, A: torch.zeros(4, 70)})), after.broadcast)
    torch.testing.assert_close(update.delta[B], lost[B])


def test_a_precision_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match=r"parts\.precision\.up must be one of float32, bf16, int8, got 'int4'"):
        Precision(up="int4")


# ---- clip and noise


def test_a_long_update_is_scaled_to_the_bound_and_a_short_one_stays():
    long = {A: torch.tensor([3.0, 0.0]), B: torch.tensor([4.0])}  # norm 5
    clipped = clip(long, 1.0)
    torch.testing.assert_close(clipped, {A: torch.tensor([0.6, 0.0]), B: torch.tensor([0.8])})
    assert clip(long, 5.0) == long
    assert clip({A: torch.zeros(2)}, 1.0)[A].tolist() == [0.0, 0.0]


def test_noise_has_the_stated_deviation_and_depends_on_client_and_round():
    part, zero = ClipNoise(clip=2.0, noise=1.5), {"x": torch.zeros(40_000)}

    def noise(client, round_):
        one = task(Broadcast(round_, {}), client, seed=ClientSeeds.of(7, round_, client).parts)
        return part.reply(one, ClientUpdate(client, zero)).delta["x"]

    drawn = noise("a", 1)
    # Standard deviation 3; of 40,000 draws it is known to 3 / sqrt(80,000) = 0.0106, four of which are allowed.
    assert float(drawn.std()) == pytest.approx(3.0, abs=0.043)
    assert float(drawn.mean()) == pytest.approx(0.0, abs=0.06)
    assert torch.equal(drawn, noise("a", 1))
    assert not torch.equal(drawn, noise("b", 1))
    assert not torch.equal(drawn, noise("a", 2))


def test_without_noise_a_short_update_keeps_its_bits():
    update = ClientUpdate("a", state())
    assert ClipNoise(clip=1e9).reply(task(Broadcast(1, {})), update).delta == replace(update).delta


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"clip": 0.0}, "clip must be positive"),
        ({"noise": -1.0}, "at least 0"),
        ({"clip": 1e9, "noise": 1.0}, r"noise must be at most 10000 / clip, got 1.0"),
    ],
)
def test_bounds_that_make_no_sense_are_refused(options, rule):
    with pytest.raises(ConfigError, match=rule):
        ClipNoise(**options)


# ---- in a run


def test_ranks_of_a_client_that_nobody_is_are_refused_before_anything_is_written(tmp_path):
    words = ["recipe=fedproxy_tiny", "parts.ranks.pad=true", "parts.ranks.clients.tiny_sum=2"]
    with pytest.raises(ConfigError, match=r"^parts.ranks: there is no client 'tiny_sum'; did you mean 'tiny_sums'"):
        run(load_config([*words, f"output_dir={tmp_path / 'run'}"]))
    assert not (tmp_path / "run").exists()
