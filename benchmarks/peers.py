"""The same rules as shipped by mergekit, Flower and PEFT, behind one signature, for benchmarks and parity vectors.

mergekit is LGPL and Flower is heavy: neither is a dependency of ours. Install them into an environment of their own,
next to this package: ``pip install --no-deps mergekit flwr`` plus what their import asks for.

``python benchmarks/peers.py tests/golden/peers.json`` stores what they compute on small fixed inputs.
"""

import importlib
import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch


def mergekit_rule(method):
    """Return a mergekit rule: one tensor of every client and parameters -> merged tensor, on a base of zeros."""
    merge_tensors = importlib.import_module("mergekit.merge_methods.api").merge_tensors

    def merge(tensors, **parameters):
        return merge_tensors([torch.zeros_like(tensors[0]), *tensors], method, parameters=parameters, base_index=0)

    return merge


def flower_rules():
    """Return Flower's rules: [(arrays, num_examples)] and options -> arrays."""
    return importlib.import_module("flwr.server.strategy.aggregate")


def peft_rules():
    """Return PEFT's rules: tensors, weights, options -> merged tensor."""
    return importlib.import_module("peft.utils.merge_utils")


def flower_yogi(rounds, **options):
    """Run Flower's FedYogi from zeros over rounds of [(update arrays, num_examples)]; return the arrays after each."""
    common = importlib.import_module("flwr.common")
    strategy = importlib.import_module("flwr.server.strategy").FedYogi(
        initial_parameters=common.ndarrays_to_parameters([array * 0 for array in rounds[0][0][0]]), **options
    )
    status = common.Status(common.Code.OK, "")
    after = []
    for number, results in enumerate(rounds, start=1):
        start = strategy.current_weights
        fits = []
        for arrays, examples in results:
            tuned = [array + change for array, change in zip(start, arrays, strict=True)]
            fits.append((None, common.FitRes(status, common.ndarrays_to_parameters(tuned), examples, {})))
        merged, _ = strategy.aggregate_fit(number, fits, [])
        after.append(common.parameters_to_ndarrays(merged))
    return after


def mergekit_keep_probabilities(tensor, density, epsilon):
    """Return the probabilities with which mergekit's DELLA keeps coordinates: what it hands to torch.bernoulli."""
    sparsify = importlib.import_module("mergekit.sparsify")
    seen = []

    def note(probabilities):
        seen.append(probabilities)
        return torch.ones_like(probabilities)

    real, torch.bernoulli = torch.bernoulli, note
    try:
        sparsify.della_magprune(tensor, density, epsilon)
    finally:
        torch.bernoulli = real
    return seen[0].reshape(tensor.shape)


def inputs(clients=7, shapes=((6, 5), (11,))):
    """Return small updates without ties in magnitude, one list of tensors per client."""
    rng = torch.Generator().manual_seed(11)
    return [[torch.randn(shape, generator=rng) for shape in shapes] for _ in range(clients)]


def main(path):
    """Store the peers' results."""
    updates = inputs()
    examples = [3, 1, 4, 1, 5, 9, 2]
    shares = [n / sum(examples) for n in examples]
    cases = []

    def add(peer, rule, options, merged):
        cases.append({"peer": peer, "rule": rule, "options": options, "expected": [t.tolist() for t in merged]})

    by_tensor = list(zip(*updates, strict=True))
    by_options = {"density": 0.5, "trim_scope": "tensor", "vote": "weighted", "divisor": "weight"}
    ties, crumbs, sce, stock = (mergekit_rule(name) for name in ("ties", "breadcrumbs", "sce", "model_stock"))
    add("mergekit", "ties", by_options, [ties(t, weight=shares, density=0.5) for t in by_tensor])
    options = {"density": 0.6, "gamma": 0.1}
    add("mergekit", "breadcrumbs", options, [crumbs(t, weight=shares, **options) for t in by_tensor])
    add("mergekit", "sce", {"density": 0.5}, [sce(t, select_topk=0.5) for t in by_tensor])
    add("mergekit", "sce", {}, [sce(t, select_topk=1.0) for t in by_tensor])
    add("mergekit", "model_stock", {}, [stock(t) for t in by_tensor])

    flower = flower_rules()

    def results(counts):
        return [([t.numpy().copy() for t in update], n) for update, n in zip(updates, counts, strict=True)]

    equal = [1] * len(updates)
    add("flwr", "fedavg", {}, flower.aggregate(results(examples)))
    add("flwr", "median", {}, flower.aggregate_median(results(examples)))
    add("flwr", "trimmed_mean", {"beta": 0.2}, flower.aggregate_trimmed_avg(results(examples), 0.2))
    add("flwr", "krum", {"byzantine": 2}, flower.aggregate_krum(results(equal), 2, 0))
    add("flwr", "multi_krum", {"byzantine": 2, "keep": 3}, flower.aggregate_krum(results(equal), 2, 3))
    bulyan = flower.aggregate_bulyan(results(equal), 1, flower.aggregate_krum, to_keep=0)
    add("flwr", "bulyan", {"byzantine": 1}, bulyan)
    factors = [1.0, -0.5, 0.25]
    yogi = {"eta": 0.05, "beta_1": 0.8, "beta_2": 0.9, "tau": 0.02}
    rounds = [[([a * f for a in arrays], n) for arrays, n in results(examples)] for f in factors]
    states = [[array.tolist() for array in state] for state in flower_yogi(rounds, **yogi)]
    optimizers = [{"peer": "flwr", "rule": "yogi", "options": yogi, "factors": factors, "expected": states}]
    della = {"density": 0.4, "epsilon": 0.15}
    kept = [[mergekit_keep_probabilities(t, **della).tolist() for t in update] for update in updates]
    versions = {name: version(name) for name in ("mergekit", "flwr", "torch")}
    page = {
        "made_by": "benchmarks/peers.py",
        "versions": versions,
        "num_examples": examples,
        "updates": [[t.tolist() for t in update] for update in updates],
        "cases": cases,
        "server_optimizers": optimizers,
        "keep_probabilities": {"peer": "mergekit", "rule": "della", "options": della, "expected": kept},
    }
    Path(path).write_text(json.dumps(page) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
