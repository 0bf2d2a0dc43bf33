"""Every rule equals its definition: plain torch on whole updates in float64, which a reader checks beside the paper."""

from dataclasses import replace
from importlib import import_module

import pytest
import torch

from fedproxy.protocol import ClientUpdate
from fedproxy.seeding import generator
from fedproxy.strategies import functional
from fedproxy.strategies.aggregators import Aggregator, RoundContext
from fedproxy.strategies.functional.h_ties import h_ties
from fedproxy.strategies.functional.means import centered_clipping, fedavg, geometric_median_cost
from fedproxy.strategies.functional.multitask import cagrad_gain, mgda_cost
from fedproxy.strategies.functional.ties import elected_mean
from fedproxy.strategies.functional.trimming import top_share

SHAPES = {"a.weight": (7, 11), "b.weight": (300,), "c": ()}
SIZE = 378


def make_updates(clients, seed, grid):
    """Return updates; on a grid, magnitudes tie, sums vanish and coordinates stay where they were.

    Counts of examples are powers of two, so that weighted sums on the grid are exact in float32, too.
    """
    rng = torch.Generator().manual_seed(seed)
    updates = []
    for k in range(clients):
        delta = {name: torch.randn(shape, generator=rng) * (1 + k / 4) for name, shape in SHAPES.items()}
        if grid:
            delta = {name: (2 * tensor).round() / 2 for name, tensor in delta.items()}
        fisher = {name: torch.rand(shape, generator=rng) for name, shape in SHAPES.items()}
        fisher["b.weight"][:50] = 0.0  # of these no client knows anything
        inputs = torch.randn(9, 11, generator=rng)
        extras = {"fisher": fisher, "gram": {"a.weight": inputs.T @ inputs}}
        updates.append(ClientUpdate(f"c{k}", delta, num_examples=2 ** max(0, k - 1), extras=extras))
    return updates


def flat(tensors):
    """Return float64 (n,): tensors by name, row-major."""
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def whole(updates):
    return torch.stack([flat(update.delta) for update in updates])


def shares_of(updates):
    counts = torch.tensor([update.num_examples for update in updates]).double()
    return counts / counts.sum()


class Case:
    """A round as definitions take it: rows (clients, n), shares, and what rules of one tensor or random rules need."""

    def __init__(self, updates):
        self.updates, self.rows, self.shares = updates, whole(updates), shares_of(updates)

    def each(self, define, *others):
        """Apply a definition to one tensor after the other; return what it gives of all, in rows (..., n)."""
        parts = []
        for name, shape in sorted(SHAPES.items()):
            stack = torch.stack([update.delta[name] for update in self.updates]).double()
            part = define(stack, *(other[name] for other in others))
            parts.append(part.double().reshape(-1, torch.Size(shape).numel()))
        return torch.cat(parts, dim=1)

    def each_flat(self, define):
        return self.each(lambda stack: define(stack.reshape(len(stack), -1)))

    def stream(self, update, *purpose):
        return generator(0, 1, update.client_id, *purpose)

    def draws(self, purpose):
        """Return draws in [0, 1), float32 (clients, *shape) by tensor: every client and tensor has its own stream."""
        return {
            name: torch.stack([torch.rand(shape, generator=self.stream(u, purpose, name, 0)) for u in self.updates])
            for name, shape in SHAPES.items()
        }


def on_rows(define, case, **options):
    return define(case.rows, **options)


def with_shares(define, case, **options):
    return define(case.rows, case.shares, **options)


def on_tensors(define, case, **options):
    return case.each_flat(lambda rows: define(rows, **options))[0]


def as_called(define, case, **options):
    """Call a definition that the aggregator calls too: in its float32, where equal values are equal."""
    return case.each_flat(lambda rows: define(rows.float(), **options))[0]


def merged(sparse, case, *, merge="linear", scale=1.0, **vote):
    return scale * (fedavg(sparse, case.shares) if merge == "linear" else elected_mean(sparse, case.shares, **vote))


def dare(define, case, *, drop_rate=0.9, **merge):
    return merged(case.each(lambda *stacks: define(*stacks, drop_rate=drop_rate), case.draws("dare")), case, **merge)


def della(define, case, *, density=0.3, window=0.2, **merge):
    thin = lambda *stacks: define(*stacks, density=density, window=window)  # noqa: E731
    return merged(case.each(thin, case.draws("della")), case, **merge)


def breadcrumbs(define, case, *, density=0.85, gamma=0.01, **merge):
    return merged(case.each_flat(lambda rows: define(rows, density=density, gamma=gamma)), case, **merge)


def ties(define, case, *, density=0.2, trim_scope="global", **options):
    if trim_scope == "global" and not {"vote", "divisor"} & set(options):
        return define(case.rows, density=density, **options)

    def trim(rows):
        return torch.stack([top_share(row, density) for row in rows])

    return merged(case.each_flat(trim) if trim_scope == "tensor" else trim(case.rows), case, merge="ties", **options)


def centred(define, case, **options):
    return define(case.rows, torch.zeros(SIZE).double(), **options)


def pcgrad(define, case):
    clients = len(case.updates)
    orders = [torch.randperm(clients, generator=case.stream(update, "pcgrad")) for update in case.updates]
    return define(case.rows, torch.stack(orders))


def fisher(define, case):
    information = torch.stack([flat(update.extras["fisher"]) for update in case.updates])
    return define(case.rows, information, case.shares)


def regmean(define, case, **options):
    grams = [update.extras["gram"]["a.weight"].double() for update in case.updates]
    # The layer of (7, 11) has Gram matrices; the other tensors are averaged.
    return case.each(
        lambda stack: (
            define(stack, grams, case.shares, **options)
            if stack.dim() == 3
            else fedavg(stack.reshape(len(stack), -1), case.shares)
        )
    )[0]


DEFINITIONS = {
    "fedavg": (with_shares, [{}]),
    "task_arithmetic": (on_rows, [{}, {"scale": 1.5}]),
    "h_ties": (
        lambda define, case, **options: define(case.rows, **options)[0],
        [{}, {"r0": 0.7, "delta": 0.6}, {"rho": 1.0}, {"rho": 3.0, "eps": 1e-2}, {"r0": 0.001, "delta": 0.0}],
    ),
    "ties": (
        ties,
        [
            *({}, {"density": 1.0, "scale": 0.5}, {"density": 0.01}, {"trim_scope": "tensor"}),
            {"trim_scope": "tensor", "vote": "weighted", "divisor": "weight"},
            {"density": 0.5, "divisor": "weighted_count", "scale": 2.0},
        ],
    ),
    "dare": (dare, [{}, {"drop_rate": 0.5, "merge": "ties"}, {"drop_rate": 0.0, "scale": 2.0}]),
    "della": (della, [{}, {"density": 0.5, "window": 0.9, "merge": "ties", "vote": "weighted"}, {"window": 0.0}]),
    "breadcrumbs": (breadcrumbs, [{}, {"density": 0.3, "gamma": 0.2, "merge": "ties"}, {"gamma": 0.9, "scale": 2.0}]),
    "sce": (as_called, [{}, {"density": 0.3}]),
    "model_stock": (on_tensors, [{}]),
    "consensus": (as_called, [{}, {"scale": 1.0, "threshold": 0.7, "min_clients": 3}]),
    "pcgrad": (pcgrad, [{}]),
    "config": (on_rows, [{}, {"length": "mean"}]),
    "median": (on_rows, [{}]),
    "trimmed_mean": (on_rows, [{}, {"beta": 0.3}]),
    "norm_bound": (on_rows, [{}, {"bound": 15.0}, {"bound": 100.0}]),
    "centered_clipping": (centred, [{}, {"radius": 16.0, "iterations": 3}]),
    "krum": (lambda define, case, **options: define(case.rows, keep=1, **options), [{}, {"byzantine": 0}]),
    "multi_krum": (on_rows, [{}, {"keep": 2}, {"byzantine": 2}]),
    "bulyan": (on_rows, [{}, {"byzantine": 0}]),
    "fisher": (fisher, [{}]),
    "regmean": (regmean, [{}, {"shrink": 1.0}]),
}
"""How a definition is called, and the options to compare it with."""
LEAST = ("geometric_median", "mgda", "cagrad")
"""Rules that solve a problem: the definition is what they minimise or maximise."""
LORA = ("fedex_lora", "fedsa_lora", "ffa_lora", "flexlora", "flora", "rolora")
"""Rules on pairs of factors."""
UNDEFINED = {"none": "it merges nothing: a client's update comes back as it is"}
"""Rules without a definition, and why."""
CASES = [
    pytest.param(name, options, id=f"{name}-{options}") for name, (_, some) in DEFINITIONS.items() for options in some
]


def definition(name):
    """Return the function that a rule's class names."""
    file, function = Aggregator.by_name(name).definition.split(".")
    return getattr(import_module(f"{functional.__name__}.{file}"), function)


def test_every_rule_of_the_package_has_a_definition_or_a_reason():
    own = {name for name in Aggregator.names() if Aggregator.by_name(name).__module__.startswith("fedproxy.")}
    assert own == {*DEFINITIONS, *LEAST, *LORA, *UNDEFINED}
    assert all(definition(name).__doc__ for name in own - set(UNDEFINED))
    assert not any(Aggregator.by_name(name).definition for name in UNDEFINED)


@pytest.mark.parametrize("grid", [False, True])
@pytest.mark.parametrize("clients", [7, 8])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_rule_gives_what_its_definition_says(name, options, clients, grid):
    updates = make_updates(clients, seed=clients, grid=grid)
    wanted = DEFINITIONS[name][0](definition(name), Case(updates), **options)
    found = flat(Aggregator.by_name(name)(**options).aggregate(updates).delta)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


RANK, MODULES = 3, ("layer.0", "layer.1")


def pair(tensors, module):
    return tensors[f"{module}.lora_B.weight"].double(), tensors[f"{module}.lora_A.weight"].double()


def lora_round(ranks):
    """Return a broadcast state of two LoRA modules and a plain tensor, and updates of clients of these ranks."""
    rng = torch.Generator().manual_seed(5)

    def draw(rank):
        state = {"norm": torch.randn(4, generator=rng)}
        for module in MODULES:
            state[f"{module}.lora_A.weight"] = torch.randn(rank, 5, generator=rng)
            state[f"{module}.lora_B.weight"] = torch.randn(6, rank, generator=rng)
        return state

    return draw(RANK), [ClientUpdate(f"c{k}", draw(rank), num_examples=k + 1) for k, rank in enumerate(ranks)]


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("name", LORA)
def test_a_lora_rule_gives_what_its_definition_says(name, number):
    rule = Aggregator.by_name(name)()
    state, updates = lora_round((RANK, 1, 2, RANK) if rule.mixed_ranks else (RANK,) * 4)
    result = rule.aggregate(updates, None, RoundContext(round=number, state=state))
    shares = shares_of(updates)
    for module in MODULES:
        b, a = start = pair(state, module)
        changes = [pair(update.delta, module) for update in updates]
        trained = [(b[:, : len(change)] + more, a[: len(change)] + change) for more, change in changes]
        options = {"round_number": number} if name == "rolora" else {}
        new, into_base = definition(name)(start, trained, shares.tolist(), **options)
        moved = pair(result.delta, module)
        found = b + moved[0], a + moved[1]
        torch.testing.assert_close(found[0] @ found[1], new[0] @ new[1], rtol=1e-5, atol=1e-5)
        for factor, wanted, dim in zip(found, new, (0, 1), strict=True):  # an SVD leaves signs open
            torch.testing.assert_close(factor.norm(dim=dim), wanted.norm(dim=dim), rtol=1e-5, atol=1e-5)
        change = torch.matmul(*pair(result.base_change, module)) if result.base_change else torch.zeros(6, 5).double()
        torch.testing.assert_close(change, into_base, rtol=1e-5, atol=1e-5)
    plain = torch.stack([update.delta["norm"] for update in updates]).double()
    torch.testing.assert_close(result.delta["norm"].double(), fedavg(plain, shares), rtol=1e-5, atol=1e-6)


def test_mgda_finds_the_weights_of_least_cost():
    case = Case(make_updates(6, seed=4, grid=False))
    result = Aggregator.by_name("mgda")().aggregate(case.updates)
    weights = torch.tensor(result.diagnostics["weights"]).double()
    assert float(weights.min()) >= 0
    assert float(weights.sum()) == pytest.approx(1.0)
    torch.testing.assert_close(flat(result.delta), weights @ case.rows, rtol=1e-5, atol=1e-6)
    least = mgda_cost(weights, case.rows)
    for corner in torch.eye(6).double():  # the cost is convex: what is least nearby is least
        assert mgda_cost(0.99 * weights + 0.01 * corner, case.rows) >= least * (1 - 1e-9)


@pytest.mark.parametrize("c", [0.5, 0.9])
def test_cagrad_finds_the_step_of_most_gain(c):
    case = Case(make_updates(6, seed=4, grid=False))
    step = flat(Aggregator.by_name("cagrad")(c=c).aggregate(case.updates).delta)
    most, mean = cagrad_gain(step, case.rows, c=c), case.rows.mean(dim=0)
    assert cagrad_gain(mean, case.rows, c=c) < most
    moves = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)).double() @ case.rows
    for move in (*moves, *case.rows):
        away = step + 0.01 * move - mean
        other = mean + away * (c * mean.norm() / away.norm()).clamp(max=1.0)  # back into the ball
        assert -torch.inf < cagrad_gain(other, case.rows, c=c) <= most * (1 + 1e-6)


def test_the_conflict_map_is_equation_7():
    updates = make_updates(5, seed=1, grid=True)
    found = Aggregator.by_name("h_ties")().aggregate(updates).conflict
    assert found is not None
    torch.testing.assert_close(flat(found), h_ties(whole(updates))[1], rtol=0, atol=1e-6)


def test_centered_clipping_starts_from_the_last_centre():
    rule = Aggregator.by_name("centered_clipping")(radius=12.0)
    first, second = make_updates(4, 1, grid=False), make_updates(4, 2, grid=False)
    memory = rule.aggregate(first).memory
    centre = centered_clipping(whole(first), torch.zeros(SIZE).double(), radius=12.0)
    wanted = centered_clipping(whole(second), centre, radius=12.0)
    torch.testing.assert_close(flat(rule.aggregate(second, memory).delta), wanted, rtol=1e-5, atol=1e-6)


def test_no_point_near_the_geometric_median_costs_less():
    # shares of 1/21 to 6/21: where one has half of the weight or more, that update is the median
    updates = [replace(u, num_examples=k) for k, u in enumerate(make_updates(6, seed=4, grid=False), 1)]
    shares = shares_of(updates)
    found = flat(Aggregator.by_name("geometric_median")().aggregate(updates).delta)
    least = geometric_median_cost(found, whole(updates), shares)
    steps = torch.randn(50, SIZE, generator=torch.Generator().manual_seed(0)).double()
    for step in (*steps, *(whole(updates) - found)):
        assert geometric_median_cost(found + 0.01 * step, whole(updates), shares) > least


def test_h_ties_on_the_paper_notes_numbers():
    # Equal and opposite updates: no sign reaches the ratio. Conflict 1 where they oppose, 0 where they agree.
    merged, conflict = h_ties(torch.tensor([[1.0, -3.0, 2.0], [-1.0, 3.0, 2.0]]).double(), delta=0.0)
    assert merged.tolist() == pytest.approx([0.0, 0.0, 2.0])
    assert conflict.tolist() == [1.0, 1.0, 0.0]
