"""Two sites, each with its own process's worth of state, end a run with the same bytes as one process."""

import json

import pytest
from safetensors.torch import load_file

from fedproxy.config import load_config
from fedproxy.data.partition.rows import read_client_rows
from fedproxy.data.tokenisation import tokenise
from fedproxy.errors import ClientError
from fedproxy.federation.client.scoring import answer_sums
from fedproxy.models import load_model, load_tokenizer
from fedproxy.pipeline.inputs import ChangedInputError
from fedproxy.pipeline.run import run
from fedproxy.sealed import read_sealed, write_sealed
from fedproxy.sites.resident import Resident
from fedproxy.sites.signing import register_site
from fedproxy.sites.site_config import SitePlace
from fedproxy.sites.site_rows import SiteRows

from .fake_courier import FakeCourier

TASKS = ("tiny_colors", "tiny_sums", "tiny_opposites", "tiny_places")
OWNERS = [("ward_a", TASKS[0]), ("ward_a", TASKS[1]), ("ward_b", TASKS[2]), ("ward_b", TASKS[3])]
AT_SITES = ["engine.name=flower", "data.partition.name=sites", "data.partition.clients=4"]
SMALL = ["recipe=fedproxy_tiny", "data.rows_per_task=24", "federation.rounds=2", "evaluation.tasks=[]"]


def site(folder, name, tasks, *, holdout="null", **policy):
    folder.mkdir(parents=True)
    rules = "".join(f"  {key}: {value}\n" for key, value in {"least_rows": 1, **policy}.items())
    clients = "".join(f"  {task}: {{tasks: [{task}], rows_per_task: 24, holdout: {holdout}}}\n" for task in tasks)
    text = f"name: {name}\nworkers: 1\ntrainer: {{accelerator: cpu, devices: 1, precision: 32-true}}\n"
    (folder / "site.yaml").write_text(f"{text}clients:\n{clients}policy:\n{rules}")
    place = SitePlace.read(folder / "site.yaml")
    return Resident(place, SiteRows(place.rows(), place.folder / "rows", least=place.config.policy.least_rows))


@pytest.fixture
def sites(tmp_path, monkeypatch):
    made = {}

    def make(courier=FakeCourier, **options):
        for name, tasks in {"ward_a": TASKS[:2], "ward_b": TASKS[2:]}.items():
            made[name] = site(tmp_path / name, name, tasks, **options)
        courier = courier({name: resident.serve for name, resident in made.items()}, tmp_path / "line")
        monkeypatch.setattr("fedproxy.federation.engines.flower.FlowerCourier", lambda hub: courier)
        monkeypatch.setattr("fedproxy.federation.engines.flower.registered", lambda hub: sorted(made))
        return courier

    yield make
    for resident in made.values():
        resident.close()


class Sniffed(FakeCourier):
    """Keeps every byte that passes."""

    def __init__(self, sites, folder):
        super().__init__({name: self.listening(serve) for name, serve in sites.items()}, folder)
        self.down, self.up = bytearray(), bytearray()

    def listening(self, serve):
        def heard(head, payload):
            self.down += json.dumps(head).encode() + payload.read_bytes()
            answer, source = serve(head, payload)
            self.up += json.dumps(answer).encode() + b"".join(source.pieces())
            return answer, source

        return heard


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


@pytest.mark.slow
def test_no_byte_on_the_line_names_the_target_or_quotes_a_row_also_when_a_client_fails(sites, tmp_path):
    courier = sites(courier=Sniffed)
    rows = [json.loads(line) for line in next((tmp_path / "ward_a/site/rows").iterdir()).read_text().splitlines()]
    broken = tmp_path / "ward_a/site/rows"
    words = [*SMALL, *AT_SITES, f"output_dir={tmp_path / 'run'}", "resume=auto"]
    first = sorted(broken.iterdir())[0]
    whole = first.read_bytes()
    first.write_text(json.dumps({"prompt": rows[0]["prompt"], "oops": 1}) + "\n")  # an error that quotes a row
    with pytest.raises(ClientError, match=r"^client 'tiny_colors' does not say what it is: DataError; details in"):
        run(load_config(words))
    first.write_bytes(whole)
    run(load_config(words))
    layer_map = json.loads((tmp_path / "run/server/layer_map.json").read_text())
    forbidden = ["tiny-llama", "asset:", str(tmp_path), "layer_map", layer_map["target_sha256"], "server/"]
    assert len(courier.down) > 100_000
    assert not [text for text in forbidden if text.encode() in courier.down]
    texts = [row[key].strip() for row in rows for key in ("prompt", "target") if len(row[key].strip()) > 12]
    assert len(texts) > 20
    assert not [text for text in texts if text.encode() in courier.up]


@pytest.mark.slow
def test_secure_sums_are_of_sites_that_pinned_each_others_keys(sites, tmp_path):
    words = ["aggregator.name=fedavg", "regularizer.name=none", "privacy.secure_aggregation=true"]
    here = trained(tmp_path, "here", "engine.name=in_process", "engine.threads=1", *words)
    sites(statistics=True)
    files = [tmp_path / ward / "site.yaml" for ward in ("ward_a", "ward_b")]
    keys = [dict(register_site(SitePlace.read(file))) for file in files]
    for file, theirs in zip(files, reversed(keys), strict=True):
        file.write_text(f"{file.read_text()}peers: {json.dumps(theirs)}\n")
        register_site(SitePlace.read(file))
    there = trained(tmp_path, "there", *AT_SITES, *words)
    assert all(here[name].equal(there[name]) for name in here)


@pytest.mark.slow
def test_final_scores_come_from_rows_that_sites_hold_back_as_sums_and_counts(sites, tmp_path):
    courier = sites(courier=Sniffed, holdout=0.25, least_held_out=5)
    done = run(load_config([*SMALL, *AT_SITES, f"output_dir={tmp_path / 'run'}"]))
    found = done.at_sites
    assert (found.clients, found.rows, found.after_round, found.missing) == (4, 24, 2, {})
    assert found.scores["proxy_tuned"]["answer_nll"] < found.scores["proxy"]["answer_nll"]
    held_out = [read_client_rows(tmp_path / ward / "site/rows", task, held_out=True) for ward, task in OWNERS]
    assert [len(rows) for rows in held_out] == [6] * 4
    proxy, tokenizer = load_model(tmp_path / "run/proxy", dtype="float32"), load_tokenizer(tmp_path / "run/proxy")
    rows = [row for own in held_out for row in own]
    examples = tokenise(rows, tokenizer, max_input_tokens=256, max_target_tokens=64)
    total, count = answer_sums(proxy, examples, 0, {"accelerator": "cpu"})["answer_nll"]
    assert found.scores["proxy"]["answer_nll"] == pytest.approx(total / count, rel=1e-5)
    assert "## At sites" in (tmp_path / "run/report.md").read_text()
    asked = courier.down.count(b'"kind": "evaluate"')
    again = run(load_config([*SMALL, *AT_SITES, f"output_dir={tmp_path / 'run'}", "resume=auto", "evaluation.seed=7"]))
    assert again.at_sites == found
    assert asked == 4
    assert courier.down.count(b'"kind": "evaluate"') == asked  # noted, and not asked for again


@pytest.mark.slow
def test_a_site_that_sums_up_too_few_rows_says_so_and_the_report_names_it(sites, tmp_path):
    sites(holdout=0.25, least_held_out=7)
    done = run(load_config([*SMALL, *AT_SITES, "federation.rounds=1", f"output_dir={tmp_path / 'run'}"]))
    assert (done.at_sites.clients, done.at_sites.scores) == (0, {})
    assert all("policy.least_held_out is 7" in why for why in done.at_sites.missing.values())
    assert sum("policy.least_held_out is 7" in note for note in done.notes) == 4


@pytest.mark.slow
def test_what_a_policy_refuses_is_named_in_the_runs_error(sites, tmp_path):
    sites(most_epochs=1)
    with pytest.raises(ClientError, match=r"site 'ward_.': its policy does not allow it: policy.most_epochs is 1"):
        run(load_config([*SMALL, *AT_SITES, "client.epochs=2", f"output_dir={tmp_path / 'run'}"]))


@pytest.mark.slow
def test_a_site_whose_answer_was_lost_is_asked_again_and_does_not_train_again(sites, tmp_path):
    here = trained(tmp_path, "here", "engine.name=in_process", "engine.threads=1")
    courier = sites()
    courier.errors = {"ward_b": []}
    asked = courier.push

    def push(to, payload, ttl_s):
        if any(line["kind"] == "train" for line in to.values()) and not courier.errors.get("done"):
            courier.errors = {"ward_b": ["after"], "done": [0]}
        return asked(to, payload, ttl_s)

    courier.push = push
    there = trained(tmp_path, "there", *AT_SITES)
    assert all(here[name].equal(there[name]) for name in here)
    journal = [json.loads(line) for line in (tmp_path / "ward_b/site/journal.jsonl").read_text().splitlines()]
    assert [line["round"] for line in journal if line["kind"] == "train"] == [1, 1, 2]
    assert [line["seconds"] < 1 for line in journal if line["kind"] == "train"][1]


@pytest.mark.slow
def test_a_run_that_goes_on_takes_its_sites_back_with_it(sites, tmp_path):
    words = ["aggregator.name=fedavg", "regularizer.name=scaffold"]
    here = trained(tmp_path, "here", "engine.name=in_process", "engine.threads=1", *words)
    sites(statistics=True)
    first = [*AT_SITES, *words, f"output_dir={tmp_path / 'there'}"]
    run(load_config([*SMALL, "federation.rounds=1", *first]))
    there = trained(tmp_path, "there", *AT_SITES, *words, "resume=auto")
    assert all(here[name].equal(there[name]) for name in here)


@pytest.mark.slow
def test_a_run_does_not_go_on_with_other_numbers_of_rows(sites, tmp_path):
    sites()
    first = [*AT_SITES, f"output_dir={tmp_path / 'there'}"]
    run(load_config([*SMALL, "federation.rounds=1", *first]))
    note = tmp_path / "there/server/facts.json"
    facts = read_sealed(note)
    assert {name: data["rows"] for name, data in facts["inputs"]["data"].items()} == dict.fromkeys(
        (task for _, task in OWNERS), 24
    )
    client = OWNERS[0][1]
    facts["inputs"]["data"][client]["rows"] = 23  # as if the site had held one fewer then
    write_sealed(note, facts)
    said = rf"data changed since the run in .* began: {client} had 23 rows and has 24 rows"
    with pytest.raises(ChangedInputError, match=said):
        run(load_config([*SMALL, *first, "resume=auto"]))
