import json
import subprocess
import sys
import time

import pytest

from fedproxy.command import run_command
from fedproxy.errors import CheckpointError, ConfigError
from fedproxy.locks import locked
from fedproxy.report import USAGE, main
from fedproxy.reporting.pages import save_report

from .report_samples import full_report, lm_eval_results, save_samples


def test_pages_are_made_again_from_the_json(tmp_path, capsys):
    save_report(full_report(), tmp_path)
    pages = [tmp_path / "report.md", tmp_path / "report.html"]
    before = [page.read_text() for page in pages]
    for page in pages:
        page.unlink()
    main([str(tmp_path)])
    assert [page.read_text() for page in pages] == before
    assert capsys.readouterr().out.split() == [str(page) for page in pages]


@pytest.mark.parametrize(
    ("inside", "word", "again"), [("run", ".", "../run-again"), ("run/server", "..", "../../run-again")]
)
def test_a_run_is_named_from_within(tmp_path, monkeypatch, inside, word, again):
    save_report(full_report(), tmp_path / "run")
    (tmp_path / inside).mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / inside)
    for page in ("report.md", "report.html"):
        (tmp_path / "run" / page).unlink()
    main([word])
    page = (tmp_path / "run" / "report.md").read_text()
    assert f"python -m fedproxy.report {word} {again}\n" in page
    assert (tmp_path / inside / again).resolve() == tmp_path / "run-again"


def test_pages_of_others_are_left_alone(tmp_path):
    save_report(full_report(), tmp_path / "run")
    (tmp_path / "report.json").write_text((tmp_path / "run" / "report.json").read_text())
    for name in ("report.md", "report.html"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(
            CheckpointError, match=rf"{name} is there, and .* is not the folder of a run, .*move it away"
        ):
            main([str(tmp_path / "report.json")])
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    (tmp_path / "run" / "config.yaml").write_text("")
    (tmp_path / "run" / "server").mkdir()
    main([str(tmp_path / "run")])  # a run's own pages are made again
    with locked(tmp_path / "run"):
        for words in ([tmp_path / "run"], [tmp_path, tmp_path / "run"]):
            with pytest.raises(ConfigError, match=r"^run .*run is in use by process \d+ on"):
                main([str(word) for word in words])


def test_a_page_of_the_same_name_is_not_taken_for_a_comparison(tmp_path):
    save_samples(tmp_path / "base")
    save_samples(tmp_path / "new", fused=0.7)
    for name, content in (("paired_with_base.md", "mine"), ("paired_with_base.json", "{}")):
        (tmp_path / "new" / name).write_text(content)
        with pytest.raises(CheckpointError, match="paired_with_base"):
            main([str(tmp_path / "base"), str(tmp_path / "new")])
        assert (tmp_path / "new" / name).read_text() == content
        (tmp_path / "new" / name).unlink()


def test_two_runs_print_and_leave_a_paired_table(tmp_path, capsys):
    save_samples(tmp_path / "base")
    save_samples(tmp_path / "new", fused=0.7)
    main([str(tmp_path / "base"), str(tmp_path / "new")])
    page = (tmp_path / "new" / "paired_with_base.md").read_text()
    assert page in capsys.readouterr().out
    assert "| fused" in page
    saved = json.loads((tmp_path / "new" / "paired_with_base.json").read_text())
    assert [row["name"] for row in saved["models"]] == ["fused"]
    assert saved["alike"] == ["target", "proxy", "proxy_tuned"]
    assert saved["models"][-1]["difference"]["estimate"] > 0
    assert [row["name"] for row in saved["tasks"]] == ["easy", "hard"]


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
    run_command(main, USAGE)


def test_failures_are_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, tmp_path / "none")
    assert capsys.readouterr().err.startswith("error: cannot read ")
    save_samples(tmp_path / "a")
    save_samples(tmp_path / "b", results=lm_eval_results(lm_eval_version="0.4.12"))
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, tmp_path / "a", tmp_path / "b")
    error = capsys.readouterr().err
    assert "easy has lm-eval 0.4.13 against 0.4.12" in error
    assert error.count("\n") == 1


def test_help_is_quick_and_has_examples():
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "fedproxy.report", "--help"], capture_output=True, text=True, check=True
    )
    assert time.perf_counter() - start < 1.0
    assert "python -m fedproxy.report runs/fedproxy_llama" in done.stdout


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--wach", "a"], "--wach is neither a run's folder nor an option; did you mean '--watch'"),
        (["none", "a"], "none is no folder; give the folder of a finished run"),
        (["a", "none"], "none is no folder; give the folder of a finished run"),
    ],
)
def test_what_is_no_run_is_named(tmp_path, monkeypatch, words, line):
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=line):
        main(words)


@pytest.mark.parametrize("runs", [[], ["a", "b", "c"]])
def test_none_or_too_many_runs_are_refused(runs):
    with pytest.raises(ConfigError, match=f"one run's folder, or two to compare, got {len(runs)}"):
        main(runs)
