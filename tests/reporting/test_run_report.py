import json
import math
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from fedproxy.errors import CheckpointError
from fedproxy.files import plain
from fedproxy.reporting import (
    CompressionReport,
    Cost,
    Exposure,
    FidelityReport,
    Provenance,
    RoundReport,
    RunInfo,
    RunReport,
    ValidationReport,
    with_means,
)
from fedproxy.reporting.at_sites import SiteScores
from fedproxy.reporting.pages import save_report
from fedproxy.reporting.privacy import PrivacyReport


def report(**changes):
    scores = with_means(
        {
            "target": {"easy": {"acc": 0.4, "acc_stderr": 0.03, "acc_norm": 0.40, "acc_norm_stderr": 0.03, "n": 100}},
            "proxy": {"easy": {"acc": 0.3, "acc_stderr": 0.03, "acc_norm": 0.35, "acc_norm_stderr": 0.03, "n": 100}},
            "proxy_tuned": {"easy": {"acc": 0.4, "acc_norm": 0.42, "n": 100}},
            "fused": {"easy": {"acc": 0.5, "acc_stderr": 0.04, "acc_norm": 0.48, "acc_norm_stderr": 0.04, "n": 100}},
        }
    )
    rounds = (RoundReport(1, ("a", "b"), train_loss=2.5, weights=(0.5, 0.5), cosine=((1.0, 0.2), (0.2, 1.0))),)
    values = {
        "run": RunInfo("tiny", "fedproxy", "completed", 42, "2026-01-02T03:04:05Z", 12.0),
        "scores": scores,
        "rounds": rounds,
    }
    return RunReport(**{**values, **changes})


def test_top_level_and_section_keys_are_the_published_ones():
    # the key lists of the published schema, version 1
    data = report().to_dict()
    assert list(data) == ["schema_version", "run", "scores", "cost", "exposure", "rounds", "provenance"]
    assert set(data["run"]) == {"recipe", "method", "status", "seed", "started", "seconds", "error"}
    cost = (
        "target_parameters proxy_parameters trainable_parameters upload_bytes download_bytes client_seconds "
        "server_seconds evaluation_seconds peak_memory_bytes"
    )
    assert set(data["cost"]) == set(cost.split(" "))
    assert set(data["exposure"]) == {"disclosed_parameter_share", "proxy_gap", "proxy_tuned_gap"}
    line = (
        "round clients train_loss regularizer_loss heterogeneity weights retention conflict_mean cosine sign_agreement "
        "kept_density update_norms factor_mean_error upload_bytes download_bytes seconds"
    )
    assert set(data["rounds"][0]) == set(line.split(" "))
    assert set(data["provenance"]) == {"versions", "git_commit", "target_sha256", "data_sha256", "hardware"}


def test_every_key_is_documented():
    page = (Path(__file__).parents[2] / "docs" / "reports.md").read_text()
    kinds = (RunInfo, Cost, Exposure, RoundReport, Provenance, CompressionReport, FidelityReport, ValidationReport)
    for key in (item.name for kind in (*kinds, PrivacyReport, SiteScores) for item in fields(kind)):
        assert f"`{key}`" in page, key


def test_saved_report_loads_equal_from_folder_and_file(tmp_path):
    before = report(compression=CompressionReport((0.5, 0.1), (0,)), notes=("4-bit",))
    path = save_report(before, tmp_path / "runs" / "x")
    assert RunReport.load(path) == before
    assert RunReport.load(path.parent) == before


def test_nan_infinity_and_tensors_become_json(tmp_path):
    line = RoundReport(
        1, ("a", "b"), train_loss=math.nan, weights=torch.tensor([0.25, 0.75]), cosine=torch.tensor([[1, math.inf]] * 2)
    )
    save_report(report(rounds=(line,)), tmp_path)
    text = (tmp_path / "report.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    saved = json.loads(text)["rounds"][0]
    assert saved["train_loss"] is None
    assert saved["weights"] == [0.25, 0.75]
    assert saved["cosine"] == [[1.0, None], [1.0, None]]


def test_plain_refuses_what_json_lacks():
    with pytest.raises(TypeError, match="object has no JSON form"):
        plain({"a": object()})


def test_failed_run_is_saved_with_its_error(tmp_path):
    failed = RunReport(RunInfo("tiny", "fedproxy", "failed", 1, "2026-01-02T03:04:05Z", error="client b | no rows"))
    save_report(failed, tmp_path)
    assert RunReport.load(tmp_path).run.error == "client b | no rows"
    assert "**This run failed:** client b \\| no rows" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, r"schema_version is 2, made by a newer FedProxy; upgrade"),
        ({"schema_version": "1"}, r"schema_version must be 1, got '1'"),
        ({"scores": None}, r"scores must be an object, got None"),
        ({"scores": {"targt": {}}}, r"unknown model 'targt'; did you mean 'target'"),
        (
            {"compression": {"scores": [0.1, 0.2], "kept": [0, 2]}},
            r"compression.kept must name blocks from 0 to 1, got",
        ),
        ({"scores": {"target": {"easy": {"acc": "0.4"}}}}, r"scores.target.easy.acc must be a number, got '0.4'"),
        ({"run": {"recipe": "x"}}, r"run.method is missing"),
        (
            {"run": {**report().to_dict()["run"], "status": "done"}},
            r"run.status must be completed or failed, got 'done'",
        ),
        ({"rounds": {}}, r"rounds must be a list"),
        ({"rounds": [{"round": 1.5}]}, r"rounds\[0\].round must be a whole number, got 1.5"),
        ({"rounds": [{"round": 1, "clients": ["a"], "cosine": [[1.0, 0.1]]}]}, r"rounds\[0\].cosine must be 1 x 1"),
        ({"cost": {"upload_bytes": True}}, r"cost.upload_bytes must be a whole number, got True"),
    ],
)
def test_broken_reports_are_named_in_one_line(tmp_path, change, message):
    path = tmp_path / "report.json"
    path.write_text(json.dumps({**report().to_dict(), **change}))
    with pytest.raises(CheckpointError, match=message) as caught:
        RunReport.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_section_missing_file_and_half_a_file(tmp_path):
    data = report().to_dict()
    del data["cost"]
    with pytest.raises(CheckpointError, match="cost is missing"):
        RunReport.from_dict(data)
    with pytest.raises(CheckpointError, match=r"cannot read .*report.json: there is no such file"):
        RunReport.load(tmp_path)
    (tmp_path / "report.json").write_text('{"schema_version": 1, ')
    with pytest.raises(CheckpointError, match="is not valid JSON"):
        RunReport.load(tmp_path)


def test_a_run_may_lie_in_a_folder_called_like_a_file(tmp_path):
    folder = tmp_path / "run.json"
    save_report(report(), folder)
    assert RunReport.load(folder).path == folder


def test_a_page_that_cannot_be_read_is_not_framed(tmp_path):
    (tmp_path / "report.html").write_bytes(b"\xff")
    assert replace(report(), path=tmp_path)._repr_html_() is None


def test_scores_without_a_common_metric_are_not_called_no_scores():
    scores = {"target": {"a": {"acc": 0.5}, "b": {"f1": 0.5}, "mean": {}}}
    assert str(replace(report(), scores=scores)) == "the scored tasks have no metric in common"
    assert str(replace(report(), scores={})) == "no model was scored"


def test_unknown_keys_of_a_later_writer_are_ignored():
    data = report().to_dict()
    data["later"] = 1
    data["rounds"][0]["later"] = 1
    assert RunReport.from_dict(data) == report()


def test_unwritable_folder_is_one_line_and_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"cannot write .*report\.json"):
        save_report(report(), tmp_path / "file")
    (tmp_path / "report.json").mkdir()  # a rename onto a folder fails after the temporary file was written
    with pytest.raises(CheckpointError, match=r"cannot write .*report\.json"):
        save_report(report(), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "report.json"]


def test_exposure_measures_the_gap_to_what_clients_hold_before_and_after():
    # proxy: .40 - .35; tuned: .48 - .42
    found = Exposure.measure(report().scores, 0.5)
    assert found == Exposure(0.5, pytest.approx(0.05), pytest.approx(0.06))
    assert Exposure.measure({}, 0.5) == Exposure(0.5, None, None)
    mixed = {"target": {"mean": {"acc": 0.5, "acc_norm": 0.9}}, "proxy": {"mean": {"acc": 0.4, "acc_norm": None}}}
    assert Exposure.measure(mixed, 0.6).proxy_gap == pytest.approx(0.1)  # acc minus acc
