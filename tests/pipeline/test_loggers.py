"""Loggers get every round and score once, however often a run is stopped."""

import csv
import importlib.machinery

import pytest
import yaml

from fedproxy.errors import CheckpointError, ConfigError
from fedproxy.names import file_stem
from fedproxy.pipeline import loggers
from fedproxy.pipeline.loggers import RunLoggers, check_loggers, round_metrics

PLAIN = {"seed": 42, "client": {"lr": 0.1}, "data": {"tasks": ["a", "b"]}}
SCORES = {"fused": {"a": {"acc": 0.5, "n": 4, "acc_stderr": None}, "mean": {"acc": 0.5}}}


def record(number):
    return {
        "round": number,
        "clients": ["a", "b"],
        "train_loss": 1.0 / number,
        "factor_mean_error": None,
        "heterogeneity": [0.1, 0.2],
        "cosine": [[1.0, 0.5], [0.5, 1.0]],
        "validation": {"a": {"acc": 0.25 * number}, "mean": {"answer_nll": 2.0, "acc": None}},
    }


def test_numbers_of_a_round_by_name_by_client_and_by_source():
    assert round_metrics(record(2)) == {
        "round/train_loss": 0.5,
        "heterogeneity/a": 0.1,
        "heterogeneity/b": 0.2,
        "validation/a/acc": 0.5,
        "validation/mean/answer_nll": 2.0,
    }


def test_names_become_parts_that_every_logger_takes():
    odd = {"round": 1, "clients": ["../up", "b 2"], "loss": [0.1, 0.2], "validation": {"北京": {"acc": 0.5}}}
    assert round_metrics(odd) == {
        f"loss/{file_stem('../up')}": 0.1,
        "loss/b 2": 0.2,
        f"validation/{file_stem('北京')}/acc": 0.5,
    }


def log_in_two_sessions(name, root):
    """Rounds 1 and 2 and the scores; then, as a run that grows does it, rounds 1 to 3 and the scores again."""
    for rounds in (2, 3):
        found = RunLoggers([name], root, PLAIN)
        records = [record(number) for number in range(1, rounds + 1)]
        found.rounds(records[:-1])
        found.rounds(records[-1:])
        found.scores(SCORES, rounds)
        found.close("success")


def test_csv_holds_every_round_once(tmp_path):
    log_in_two_sessions("csv", tmp_path)
    with (tmp_path / "logs/csv/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows if row["round/train_loss"]] == ["1", "2", "3"]
    assert [(row["step"], row["scores/fused/mean/acc"]) for row in rows if row["scores/fused/a/n"]] == [("3", "0.5")]
    assert yaml.safe_load((tmp_path / "logs/csv/hparams.yaml").read_text()) == PLAIN


def test_tensorboard_goes_on(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_in_two_sessions("tensorboard", tmp_path)
    found = EventAccumulator(str(tmp_path / "logs/tensorboard"))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("validation/a/acc")] == [
        (1, 0.25),
        (2, 0.5),
        (3, 0.75),
    ]
    assert [event.step for event in found.Scalars("scores/fused/mean/acc")] == [2, 3]
    assert "_hparams_/session_start_info" in found.summary_metadata


def test_mlflow_goes_on_with_its_run(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    log_in_two_sessions("mlflow", tmp_path)
    client = MlflowClient(f"sqlite:///{tmp_path}/logs/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("fedproxy").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params == {"seed": "42", "client/lr": "0.1", "data/tasks": "['a', 'b']"}
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "round/train_loss")] == [1, 2, 3]
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "scores/fused/mean/acc")] == [2, 3]


def test_wandb_keeps_its_id_and_stays_offline(tmp_path):
    pytest.importorskip("wandb")
    log_in_two_sessions("wandb", tmp_path)
    folders = [path.name for path in (tmp_path / "logs/wandb").glob("offline-run-*")]
    assert folders
    assert len({name.rsplit("-", 1)[1] for name in folders}) == 1


def test_nothing_is_started_where_nothing_is_logged(tmp_path):
    found = RunLoggers(["csv"], tmp_path, PLAIN)
    found.scores({}, 0)
    found.close("failed")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "spec", [None, importlib.machinery.ModuleSpec("wandb", None)]
)  # missing; a folder of that name
def test_a_logger_that_is_not_installed_is_one_line(monkeypatch, spec):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: spec)
    check_loggers(["csv"])
    with pytest.raises(ConfigError, match=r"^loggers: wandb needs a package that is not installed; pip install wandb$"):
        check_loggers(["csv", "wandb"])


def test_a_logger_that_fails_is_one_line(tmp_path):
    (tmp_path / "logs").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"^loggers: csv failed \(.*File exists.*\); go on with resume=auto, or"):
        RunLoggers(["csv"], tmp_path, PLAIN).rounds([record(1)])


def test_a_run_logs_its_scores_and_its_configuration(run_tiny):
    report, folder = run_tiny("loggers=[csv]", "evaluation.models=[target]", "federation.rounds=1")
    with (folder / "logs/csv/metrics.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    assert float(last["scores/target/mean/acc_norm"]) == report.scores["target"]["mean"]["acc_norm"]
    assert yaml.safe_load((folder / "logs/csv/hparams.yaml").read_text())["client"]["batch_size"] == 8
