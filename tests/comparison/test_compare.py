"""A comparison as a whole: what it leaves, what it repeats and what it survives."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from fedproxy.comparison import execution
from fedproxy.comparison.arguments import read_study
from fedproxy.comparison.compare import _run_notes, compare
from fedproxy.comparison.execution import only_one
from fedproxy.errors import CheckpointError, ClientError, ConfigError
from fedproxy.evaluation import task_checks
from fedproxy.evaluation.loaded_task import LoadedTask
from fedproxy.reporting.comparison.records import Record

from .conftest import SMALL, table


def test_it_leaves_four_files_and_a_record_per_run(finished):
    result, folder = finished
    assert result.failed == []
    assert [path.name for path in result.files] == [f"comparison.{kind}" for kind in ("md", "html", "json", "csv")]
    assert sorted(path.parent.name for path in folder.glob("records/*/seed_7.json.gz")) == ["fedavg", "h_ties"]
    content = json.loads((folder / "comparison.json").read_text())
    assert [row["label"] for row in content["analysis"]["methods"]] == ["h_ties", "fedavg"]
    assert content["questions"] == 12  # two tasks of six
    # two clients with eight rows each, one round of one epoch
    assert {row["cost"]["examples"] for row in content["analysis"]["methods"]} == {16}
    assert content["settings"]["fedavg"]["aggregator.name"] == "fedavg"


def test_scores_are_those_of_the_runs_own_reports(finished):
    result, folder = finished
    for row in result.comparison.analysis.methods:
        report = json.loads((folder / "work/runs" / row.label / "seed_7/report.json").read_text())
        for task in ("tiny_sums", "mean"):
            assert row.scores[task].value == pytest.approx(report["scores"]["fused"][task]["acc_norm"])
            assert row.scores[task].stderr_questions == pytest.approx(
                report["scores"]["fused"][task]["acc_norm_stderr"]
            )


def test_finished_runs_are_not_repeated_and_the_table_stays(finished, compare_tiny, monkeypatch):
    _, folder = finished
    before = table(folder)
    monkeypatch.setattr(execution, "run", lambda *_: pytest.fail("a finished run was repeated"))
    compare_tiny(folder, "seeds=[7]")
    assert table(folder) == before


def test_the_same_seeds_give_the_same_table(finished, compare_tiny, tmp_path):
    compare_tiny(tmp_path / "again", "seeds=[7]")
    assert table(tmp_path / "again") == table(finished[1])
    assert not (tmp_path / "again/work/runs/h_ties/seed_7").exists()  # models are not kept unless asked for
    assert (tmp_path / "again/records/h_ties/seed_7.json.gz").is_file()


def test_records_alone_are_enough_and_another_setting_is_refused(finished, compare_tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(execution, "run", lambda *_: pytest.fail("nothing was to be run"))
    shutil.copytree(finished[1] / "records", tmp_path / "records")
    compare_tiny(tmp_path, "seeds=[7]", "only_report=true")
    assert table(tmp_path) == table(finished[1])
    with pytest.raises(
        ConfigError, match=r"seed_7.json.gz was made with client.lr=0.01, and it is 0.5 now; delete the record"
    ):
        compare_tiny(tmp_path, "seeds=[7]", "client.lr=0.5")
    with pytest.raises(CheckpointError, match="there is no finished run to compare; run the study first"):
        compare_tiny(tmp_path / "empty", "only_report=true")


def test_one_failure_is_told_and_the_rest_goes_on(finished, compare_tiny, tmp_path, monkeypatch):
    made = Record.load(finished[1] / "records/fedavg/seed_7.json.gz")

    def fail(config, *_):
        raise ClientError("client 'x' failed\nin round 1") if "h_ties" in config.output_dir else RuntimeError("boom")

    shutil.copytree(finished[1] / "records", tmp_path / "records")
    shutil.rmtree(tmp_path / "records/h_ties")
    monkeypatch.setattr(execution, "run", fail)
    result = compare_tiny(tmp_path, "seeds=[7]", "reference=fedavg")
    assert result.failed == ["h_ties, seed 7: client 'x' failed in round 1"]
    assert [row.label for row in result.comparison.analysis.methods] == ["fedavg"]
    assert result.comparison.analysis.methods[0].rounds == len(made.report.rounds)
    assert "h_ties, seed 7, failed: client 'x' failed in round 1" in (tmp_path / "comparison.md").read_text()
    shutil.rmtree(tmp_path / "records/fedavg")
    checked = []
    monkeypatch.setattr(execution, "check_comparable", checked.append)
    with pytest.raises(
        CheckpointError, match=r"there is no finished run to compare \(h_ties.*; fedavg, seed 7: Runtime"
    ):
        compare_tiny(tmp_path, "seeds=[7]")
    assert len(checked) == 1  # methods are asked the same: files of questions are read once for all
    assert "boom" in (tmp_path / "work/runs/fedavg/seed_7.traceback.txt").read_text()


def test_the_commands_exit_code_says_that_a_run_failed(finished, recipes, tmp_path, monkeypatch, capsys):
    from fedproxy.compare import main

    shutil.copytree(finished[1] / "records", tmp_path / "records")
    words = [recipes, *SMALL, f"output_dir={tmp_path}", "seeds=[7]"]
    assert main(words) == 0
    assert "| h_ties" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "records/h_ties")

    def fail(*_):
        raise ClientError("client 'x' failed")

    monkeypatch.setattr(execution, "run", fail)
    assert main(words) == 1
    assert "failed: h_ties, seed 7: client 'x' failed" in capsys.readouterr().out

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(execution, "run", interrupt)
    with pytest.raises(KeyboardInterrupt, match="go on with the same command"):
        main(words)


def test_two_comparisons_do_not_share_a_folder(compare_tiny, recipes, tmp_path):
    study = read_study([recipes, f"output_dir={tmp_path}"])
    with only_one(study), pytest.raises(ConfigError, match=r"is in use by process \d+ on .*; wait for it"):
        compare_tiny(tmp_path)


def test_unfair_recipes_are_refused_before_anything_is_written(tmp_path):
    (tmp_path / "other.yaml").write_text("extends: fedproxy_tiny\ndata: {rows_per_task: 9}\n")
    study = read_study([f"recipes=[fedproxy_tiny,{tmp_path}/other.yaml]", f"output_dir={tmp_path / 'out'}"])
    with pytest.raises(ConfigError, match=r"data.rows_per_task: fedproxy_tiny has 256 and other has 9"):
        compare(study)
    assert not (tmp_path / "out").exists()


def test_a_method_whose_parts_do_not_fit_is_refused_before_the_first_run(compare_tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"h_ties: .*aggregator 'krum' needs at least \d clients"):
        compare_tiny(tmp_path / "out", "aggregator.name=krum", "regularizer.name=none")
    assert not (tmp_path / "out").exists()


def test_killed_in_the_middle_it_goes_on_without_repeating(finished, recipes, compare_tiny, tmp_path):
    folder = tmp_path / "killed"
    words = [recipes, *SMALL, f"output_dir={folder}", "reference=h_ties", "seeds=[7]"]
    command = [sys.executable, "-m", "fedproxy.compare", *words]
    with (tmp_path / "log").open("w") as log:
        threads = {**os.environ, "OMP_NUM_THREADS": "1"}  # as many as the tests have: sums in the same order
        process = subprocess.Popen(command, stderr=log, stdout=log, start_new_session=True, env=threads)
    first, deadline = folder / "records/h_ties/seed_7.json.gz", time.monotonic() + 400
    while not first.is_file():
        assert process.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline, "no run was finished in time"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    stamp = first.stat().st_mtime_ns
    assert not (folder / "records/fedavg/seed_7.json.gz").exists()
    compare_tiny(folder, "seeds=[7]")
    assert first.stat().st_mtime_ns == stamp
    assert table(folder) == table(finished[1])


def test_a_second_table_at_equal_bytes(finished, compare_tiny, tmp_path):
    # h_ties and fedavg send the same: one round each, and the second table is the first
    shutil.copytree(finished[1] / "records", tmp_path / "records")
    result = compare_tiny(tmp_path, "seeds=[7]", "equal_bytes=most")
    second = result.comparison.equal_bytes
    assert second.rounds == {"h_ties": 1, "fedavg": 1}
    first = {row.label: row.scores for row in result.comparison.analysis.methods}
    assert {row.label: row.scores for row in second.analysis.methods} == first
    assert "## At equal bytes" in (tmp_path / "comparison.md").read_text()


def test_a_method_that_sends_less_runs_more_rounds_for_the_same_bytes(finished, tmp_path):
    (tmp_path / "last.yaml").write_text(
        "extends: fedproxy_tiny\nregularizer: {name: none}\naggregator: {name: fedavg}\n"
        "trainable: {blocks: last, last: 1}\n"
    )
    shutil.copytree(finished[1] / "records/h_ties", tmp_path / "out/records/fedproxy_tiny")
    words = [f"recipes=[fedproxy_tiny,{tmp_path}/last.yaml]", *SMALL, f"output_dir={tmp_path}/out", "seeds=[7]"]
    result = compare(read_study([*words, "equal_bytes=fedproxy_tiny"]))
    assert result.failed == []
    second = result.comparison.equal_bytes
    rounds = second.rounds["last"]
    assert second.rounds == {"fedproxy_tiny": 1, "last": rounds}
    assert rounds > 1
    record = Record.load(tmp_path / f"out/records/last@{rounds}_rounds/seed_7.json.gz")
    assert len(record.report.rounds) == rounds
    spent = record.report.cost.upload_bytes + record.report.cost.download_bytes
    assert spent <= second.budget_bytes < spent * (rounds + 1) / rounds
    assert {line.method for line in result.comparison.runs} == {"fedproxy_tiny", "last", f"last@{rounds}_rounds"}
    labels = {row.label: row.rounds for row in second.analysis.methods}
    assert labels == {"fedproxy_tiny": 1, "last": rounds}


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ("[target,proxy]", r"h_ties: evaluation.models=\['target', 'proxy'\] lacks fused, which stands for the method"),
        ("[proxy,fused]", r"evaluation.models: no method scores the target, from which gains are counted; add it"),
    ],
)
def test_scores_that_the_tables_need_are_asked_for_before_the_first_run(compare_tiny, tmp_path, models, message):
    with pytest.raises(ConfigError, match=message):
        compare_tiny(tmp_path / "out", f"evaluation.models={models}")
    assert not (tmp_path / "out").exists()


def test_a_task_without_a_common_metric_is_refused_before_the_first_run(compare_tiny, tmp_path, monkeypatch):
    from lm_eval.api.task import ConfigurableTask

    (tmp_path / "sums.jsonl").write_text('{"question": "1 + 1 =", "answer": "2"}\n')
    config = {
        "task": "generated_sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "sums.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    task = LoadedTask(ConfigurableTask(config=config), None)
    monkeypatch.setattr("fedproxy.pipeline.evaluation.expand", lambda names, _: list(names))  # lm-eval has no such name
    monkeypatch.setattr(task_checks, "load_task", lambda *_: [task])
    monkeypatch.setattr(execution, "run", lambda *_: pytest.fail("nothing was to be run"))
    message = r"^evaluation: 'generated_sums' has no metric by which .* before it do \(acc, answer_nll\); leave it out$"
    with pytest.raises(ConfigError, match=message):
        compare_tiny(tmp_path / "out", "evaluation.tasks=[tiny_sums,generated_sums]")


@pytest.mark.parametrize(
    ("words", "was"),
    [
        (["trainer.deterministic=true"], r"trainer=\{.*'precision': '32-true'.*\}, and it is .*deterministic"),
        (["data.files.ward=a.jsonl"], r"data.files=\{\}, and it is \{'ward': 'a.jsonl'\}"),
    ],
)
def test_a_key_that_a_record_lacks_is_another_setting_where_keys_are_free(finished, recipes, tmp_path, words, was):
    shutil.copytree(finished[1] / "records", tmp_path / "records")
    study = read_study([recipes, *SMALL, f"output_dir={tmp_path}", "seeds=[7]", *words])
    cell = execution.cells(study)[0]
    with pytest.raises(ConfigError, match=rf"seed_7.json.gz was made with {was}"):
        execution._recorded(cell)


@pytest.mark.parametrize("change", ["data: {partition: {name: pooled}}", "federation: {rounds: 0}"])
def test_bytes_of_a_method_that_sends_none_are_no_budget(finished, tmp_path, change):
    (tmp_path / "silent.yaml").write_text(f"extends: fedproxy_tiny\n{change}\n")
    words = [f"recipes=[fedproxy_tiny,{tmp_path}/silent.yaml]", "equal_bytes=silent", f"output_dir={tmp_path}/out"]
    with pytest.raises(ConfigError, match=r"equal_bytes=silent: that method sends nothing; name another, or least or"):
        compare(read_study(words))
    assert not (tmp_path / "out").exists()


def test_kept_runs_are_scored_again_on_more_questions_for_another_study(recipes, tmp_path):
    place = f"work_dir={tmp_path}/work"
    first = read_study([recipes, *SMALL, f"output_dir={tmp_path}/6", place, "keep_runs=true"])
    assert compare(first).failed == []
    more = [*SMALL, "evaluation.limit=8", "evaluation.models=[target,fused]"]
    result = compare(read_study([recipes, *more, f"output_dir={tmp_path}/8", place, "seeds=[42]"]))
    assert result.failed == []
    assert result.comparison.questions == 16
    record = Record.load(tmp_path / "8/records/h_ties/seed_42.json.gz")
    assert set(record.answers) == {"target", "fused"}  # not the proxy's answers to the six questions of before


def test_an_unfinished_run_of_another_setting_is_refused_with_the_way_out(compare_tiny, tmp_path, monkeypatch):
    def begin(config, *_):
        folder = execution.RunFolder(config.output_dir)
        folder.check(config)
        folder.claim(config)
        raise ClientError("client 'x' failed")

    monkeypatch.setattr(execution, "run", begin)
    with pytest.raises(CheckpointError, match="there is no finished run to compare"):
        compare_tiny(tmp_path, "seeds=[7]")
    monkeypatch.setattr(execution, "run", lambda *_: pytest.fail("nothing was to be run"))
    message = r"client.lr is 0.5, but the run in .*h_ties/seed_7 has 0.01; set it back, or delete that folder to run it"
    with pytest.raises(ConfigError, match=message):
        compare_tiny(tmp_path, "seeds=[7]", "client.lr=0.5")


def test_a_note_that_not_all_reports_have_names_its_methods(finished):
    record = Record.load(finished[1] / "records/h_ties/seed_7.json.gz")

    def noted(*notes):
        return replace(record, report=replace(record.report, notes=list(notes)))

    runs = {"a": [noted("The target.")], "b": [noted("The target.", "No client was merged.")], "waiting": []}
    assert _run_notes(runs) == ["The target.", "b: No client was merged."]
