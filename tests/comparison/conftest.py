"""Comparisons of two tiny recipes: small enough to be done several times."""

import json

import pytest

from fedproxy.comparison.arguments import read_study
from fedproxy.comparison.compare import compare

SMALL = (
    "data.rows_per_task=8",
    "client.batch_size=8",
    "federation.rounds=1",
    "evaluation.limit=6",
    "data.tasks=[tiny_sums,tiny_colors]",
    "evaluation.models=[target,proxy,fused]",
)


@pytest.fixture(scope="session")
def recipes(tmp_path_factory):
    """Return a word ``recipes=[...]`` with FedProxy's pipeline under two rules."""
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "h_ties.yaml").write_text("extends: fedproxy_tiny\n")
    (folder / "fedavg.yaml").write_text(
        "extends: fedproxy_tiny\naggregator: {name: fedavg}\nregularizer: {name: none}\n"
    )
    return f"recipes=[{folder}/h_ties.yaml,{folder}/fedavg.yaml]"


@pytest.fixture(scope="session")
def compare_tiny(recipes):
    """Compare the two recipes in a folder with further arguments."""

    def go(folder, *words):
        arguments = [recipes, *SMALL, f"output_dir={folder}", "reference=h_ties", *words]
        return compare(read_study(arguments), arguments)

    return go


@pytest.fixture(scope="session")
def finished(compare_tiny, tmp_path_factory):
    """One comparison with its run folders kept, and its folder; tests must not change it."""
    folder = tmp_path_factory.mktemp("comparison") / "out"
    return compare_tiny(folder, "keep_runs=true", "seeds=[7]"), folder


def table(folder):
    """Return all that a comparison's JSON says but times, bytes of memory and its command."""
    content = json.loads((folder / "comparison.json").read_text())
    del content["command"]
    for line in content["runs"]:
        del line["seconds"]
    for row in content["analysis"]["methods"]:
        row["cost"] = {name: value for name, value in row["cost"].items() if not name.endswith("seconds")}
    return content
