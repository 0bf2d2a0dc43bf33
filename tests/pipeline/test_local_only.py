"""A run whose clients are never merged: a model per client, means over clients, the same bits after a resume."""

import json

import pytest
import torch
from safetensors.torch import load_file

from fedproxy.errors import DataError
from fedproxy.models import load_model, state_sha256
from fedproxy.reporting import RunReport
from fedproxy.reporting.samples import load_evaluation

LOCAL = ("aggregator.name=none", "regularizer.name=none", "data.tasks=[tiny_sums,tiny_places]")
CLIENTS = ["tiny_places", "tiny_sums"]


@pytest.fixture(scope="module")
def local_run(run_tiny):
    return run_tiny(*LOCAL, "evaluation.models=[target,fused]")


def weights(path):
    return load_file(path / "model.safetensors")


def test_every_client_has_its_own_adapter_and_fused_model(local_run):
    _, folder = local_run
    assert sorted(path.name for path in (folder / "fused").iterdir()) == CLIENTS
    assert sorted(path.name for path in (folder / "adapter").iterdir()) == CLIENTS
    hashes = {state_sha256(load_model(folder / "fused" / client)) for client in CLIENTS}
    assert len(hashes) == 2
    assert all("Method: `fedproxy`" in (folder / "fused" / client / "README.md").read_text() for client in CLIENTS)


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
    left, right = weights(folder / "fused/tiny_sums"), weights(alone / "fused/tiny_sums")
    assert all(torch.equal(left[name], right[name]) for name in left)


def kept(folder):
    return json.loads((folder / "server/layer_map.json").read_text())["proxy_to_target"]


def test_resume_ends_with_the_same_bits(local_run, run_tiny):
    _, whole = local_run
    _, folder = run_tiny(*LOCAL, "federation.rounds=1", "evaluation.models=[]")
    report, _ = run_tiny(*LOCAL, "federation.rounds=2", "resume=auto", "evaluation.models=[]", folder=folder)
    assert [line.round for line in report.rounds] == [1, 2]
    state = "checkpoints/round_0002/state.safetensors"
    left, right = load_file(whole / state), load_file(folder / state)
    assert {name.partition("/")[0] for name in left} == set(CLIENTS)
    assert sorted(left) == sorted(right)
    assert all(torch.equal(left[name], right[name]) for name in left)
    for client in CLIENTS:
        one, other = weights(whole / "fused" / client), weights(folder / "fused" / client)
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_name_that_makes_no_folder_is_refused(run_tiny, tmp_path):
    rows = [{"prompt": f"Question: {i}?\nAnswer:", "target": " one"} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"with aggregator.name=none client '\.\./ward' gets a folder of its own"):
        run_tiny(
            *LOCAL[:2], "data.tasks=[]", f"data.files={{../ward: {tmp_path / 'rows.jsonl'}}}",
            "evaluation.tasks=[tiny_sums]", "evaluation.models=[]",
        )  # fmt: skip
