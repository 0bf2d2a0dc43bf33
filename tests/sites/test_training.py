"""Two sites, each with its own process's worth of state, end a run with the same bytes as one process."""

import pytest
from safetensors.torch import load_file

from fedproxy.config import load_config
from fedproxy.pipeline.run import run
from fedproxy.sites.resident import Resident
from fedproxy.sites.site_config import SitePlace
from fedproxy.sites.site_rows import SiteRows

from .fake_courier import FakeCourier

TASKS = ("tiny_colors", "tiny_sums", "tiny_opposites", "tiny_places")
AT_SITES = ["engine.name=flower", "data.partition.name=sites", "data.partition.clients=4"]
SMALL = ["recipe=fedproxy_tiny", "data.rows_per_task=24", "federation.rounds=2", "evaluation.tasks=[]"]


def site(folder, name, tasks, **policy):
    folder.mkdir(parents=True)
    rules = "".join(f"  {key}: {value}\n" for key, value in {"least_rows": 1, **policy}.items())
    clients = "".join(f"  {task}: {{tasks: [{task}], rows_per_task: 24}}\n" for task in tasks)
    text = f"name: {name}\nworkers: 1\ntrainer: {{accelerator: cpu, devices: 1, precision: 32-true}}\n"
    (folder / "site.yaml").write_text(f"{text}clients:\n{clients}policy:\n{rules}")
    place = SitePlace.read(folder / "site.yaml")
    return Resident(place, SiteRows(place.rows(), place.folder / "rows", least=place.config.policy.least_rows))


@pytest.fixture
def sites(tmp_path, monkeypatch):
    made = {}

    def make(**policy):
        for name, tasks in {"ward_a": TASKS[:2], "ward_b": TASKS[2:]}.items():
            made[name] = site(tmp_path / name, name, tasks, **policy)
        courier = FakeCourier({name: resident.serve for name, resident in made.items()}, tmp_path / "line")
        monkeypatch.setattr("fedproxy.federation.engines.flower.FlowerCourier", lambda hub: courier)
        monkeypatch.setattr("fedproxy.federation.engines.flower.registered", lambda hub: sorted(made))
        return courier

    yield make
    for resident in made.values():
        resident.close()


def trained(tmp_path, name, *words):
    config = load_config([*SMALL, *words, f"output_dir={tmp_path / name}"])
    run(config)
    return load_file(sorted((tmp_path / name / "checkpoints").glob("round_*"))[-1] / "state.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        [],
        ["aggregator.name=fedavg", "regularizer.name=scaffold"],
        ["aggregator.name=fedsa_lora", "regularizer.name=none"],
        ["parts.precision.up=int8"],
        ["aggregator.name=none", "regularizer.name=none"],
    ],
    ids=["h_ties", "scaffold", "fedsa_lora", "int8", "own_states"],
)
def test_sites_end_in_the_bytes_of_one_process(words, sites, tmp_path):
    here = trained(tmp_path, "here", "engine.name=in_process", "engine.threads=1", *words)
    sites(statistics=True)
    there = trained(tmp_path, "there", *AT_SITES, *words)
    assert here.keys() == there.keys()
    assert all(here[name].equal(there[name]) for name in here)
