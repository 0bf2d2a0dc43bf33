"""A run whose clients are never merged: a model per client, means over clients, the same bits after a resume."""

import json

import pytest
import torch
from safetensors.torch import load_file

from fedproxy.federation.client.site import Site
from fedproxy.models import load_model, state_sha256
from fedproxy.names import file_stem
from fedproxy.pipeline.plan import plan
from fedproxy.reporting import RunReport
from fedproxy.reporting.samples import load_evaluation

LOCAL = ("aggregator.name=none", "regularizer.name=none", "data.tasks=[tiny_sums,tiny_places]")
CLIENTS = ["tiny_places", "tiny_sums"]
FOLDERS = [file_stem(client) for client in CLIENTS]


@pytest.fixture(scope="module")
def local_run(run_tiny):
    return run_tiny(*LOCAL, "evaluation.models=[target,fused]")


def weights(path):
    return load_file(path / "model.safetensors")


def test_every_client_has_its_own_adapter_and_fused_model(local_run):
    _, folder = local_run
    assert sorted(path.name for path in (folder / "fused").iterdir()) == FOLDERS
    assert sorted(path.name for path in (folder / "adapter").iterdir()) == FOLDERS
    hashes = {state_sha256(load_model(folder / "fused" / client)) for client in FOLDERS}
    assert len(hashes) == 2
    assert all("Method: fedproxy" in (folder / "fused" / client / "README.md").read_text() for client in FOLDERS)


def test_scores_are_means_over_clients_and_each_clients_own_are_kept(local_run):
    report, folder = local_run
    assert set(report.client_scores) == set(CLIENTS)
    for task in ("tiny_sums", "tiny_places"):
        own = [report.client_scores[client]["fused"][task]["acc_norm"] for client in CLIENTS]
        assert report.scores["fused"][task]["acc_norm"] == pytest.approx(sum(own) / 2)
        assert report.scores["fused"][task]["n"] == 12
    samples = load_evaluation(folder, "fused")
    for task, metrics in report.scores["fused"].items():
        if task == "mean":
            continue
        # the kept samples are shares of clients, so that a paired comparison gives the report's score
        values = torch.tensor(samples.values(task, "acc_norm"), dtype=torch.float64)
        assert metrics["acc_norm"] == pytest.approx(float(values.mean()))
        assert metrics["acc_norm_stderr"] == pytest.approx(float(values.std()) / 12**0.5)
    assert RunReport.load(folder).to_dict() == report.to_dict()
    page = (folder / "report.md").read_text()
    assert "Each client's own model" in page
    assert "No client was merged with another" in page


def test_a_client_alone_gets_the_same_bits(local_run, run_tiny):
    _, folder = local_run
    # the client's rows, seeds and state are its own, so that the other client cannot matter
    _, alone = run_tiny(
        *LOCAL[:2], "data.tasks=[tiny_sums]", "evaluation.tasks=[tiny_sums]", "evaluation.models=[]",
        "compression.keep=[" + ",".join(map(str, kept(folder))) + "]",
    )  # fmt: skip
    left, right = (weights(run / "fused" / file_stem("tiny_sums")) for run in (folder, alone))
    assert all(torch.equal(left[name], right[name]) for name in left)


def kept(folder):
    return json.loads((folder / "server/layer_map.json").read_text())["proxy_to_target"]


def test_resume_ends_with_the_same_bits(local_run, run_tiny):
    _, whole = local_run
    _, folder = run_tiny(*LOCAL, "federation.rounds=1", "evaluation.models=[]")
    report, _ = run_tiny(*LOCAL, "federation.rounds=2", "resume=auto", "evaluation.models=[]", folder=folder)
    assert [line.round for line in report.rounds] == [1, 2]
    assert_same_states(whole, folder)
    for client in FOLDERS:
        one, other = weights(whole / "fused" / client), weights(folder / "fused" / client)
        assert all(torch.equal(one[name], other[name]) for name in one)


def assert_same_states(left, right):
    for client in FOLDERS:
        one, other = (load_file(run / f"checkpoints/states/{client}/round_0002.safetensors") for run in (left, right))
        assert sorted(one) == sorted(other)
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert any(tensor.any() for name, tensor in one.items() if "lora_B" in name)


def test_two_rounds_have_the_same_bits_in_this_process_and_with_workers(run_tiny):
    runs = [
        run_tiny(*LOCAL, "evaluation.models=[]", *engine)[1]
        for engine in (
            ("engine.name=in_process", "engine.threads=1"),
            ("engine.name=workers", "engine.workers=1"),  # one worker serves both clients of a round
        )
    ]
    assert_same_states(*runs)
    # in the second round each went on from its own state
    lines = [[json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()] for run in runs]
    for here, there in zip(*lines, strict=True):
        assert here["train_loss"] == there["train_loss"]
        assert here["update_norms"] == there["update_norms"]


def test_the_plan_predicts_the_bytes(local_run):
    _, folder = local_run
    predicted = plan(["recipe=fedproxy_tiny", *LOCAL]).traffic
    for number, line in enumerate((folder / "rounds.jsonl").read_text().splitlines(), start=1):
        record = json.loads(line)
        assert (record["upload_bytes"], record["download_bytes"]) == (predicted.all_up(), predicted.all_down(number))


def test_a_failing_client_is_named_and_fused_from_its_last_state(run_tiny, monkeypatch):
    train = Site.train

    def fail(self, broadcast, client_id, **limits):
        if broadcast.round == 2 and client_id == "tiny_sums":
            raise RuntimeError("out of memory")
        return train(self, broadcast, client_id, **limits)

    monkeypatch.setattr(Site, "train", fail)
    report, folder = run_tiny(*LOCAL, "federation.min_clients=1", "evaluation.models=[]")
    first, second = (line.dropped for line in report.rounds)
    assert first == {}
    assert second["tiny_sums"].startswith("RuntimeError; details in the client's log checkpoints/logs/tiny-sums-")
    kept = load_file(folder / "checkpoints/states" / FOLDERS[1] / "round_0001.safetensors")
    adapter = load_file(folder / "adapter" / FOLDERS[1] / "adapter_model.safetensors")
    assert adapter
    assert all(torch.equal(tensor, kept[f"state/{name}"]) for name, tensor in adapter.items())


def test_clients_whose_names_make_no_folder_have_folders_all_the_same(run_tiny, tmp_path):
    rows = [{"prompt": f"Question: {i}?\nAnswer:", "target": " one"} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = ["../ward", "北京/民", "w" * 100]
    files = ", ".join(f"{name}: {tmp_path / 'rows.jsonl'}" for name in names)
    report, folder = run_tiny(
        *LOCAL[:2], "data.tasks=[]", f"data.files={{{files}}}", "evaluation.tasks=[tiny_sums]",
        "evaluation.models=[fused]",
    )  # fmt: skip
    assert set(report.client_scores) == set(names)
    places = json.loads((folder / "partition.json").read_text())["files"]
    assert sorted(path.name for path in (folder / "fused").iterdir()) == sorted(places.values())
    for name in names:
        accuracy = report.client_scores[name]["fused"]["tiny_sums"]["acc_norm"]
        assert f"{100 * accuracy:.1f}" in (folder / "fused" / places[name] / "README.md").read_text()
        assert (folder / f"evaluation/fused.{places[name]}.samples.jsonl").is_file()
