"""Validation between rounds as pages show it: columns, curves with words, and which round was fused."""

from fedproxy.reporting import RoundReport, RunInfo, RunReport, ValidationReport
from fedproxy.reporting.html import to_html
from fedproxy.reporting.markdown import to_markdown
from fedproxy.reporting.pages import save_report
from fedproxy.reporting.plots import draw_plots

RUN = RunInfo("tiny", "fedproxy", "completed", 42, "2026-01-02T03:04:05Z", 12.0)


def scores(nll, **accuracies):
    return {"easy": {"answer_nll": nll - 0.5, **accuracies}, "mean": {"answer_nll": nll, "n": 64, **accuracies}}


def report(*validations, **changes):
    rounds = tuple(RoundReport(i, ("a", "b"), train_loss=2.0, validation=v) for i, v in enumerate(validations, 1))
    found = ValidationReport("fused", "answer_nll", "best", 64, 3)
    return RunReport(**{"run": RUN, "rounds": rounds, "validation": found, **changes})


def plots(found):
    return {plot.title: plot.description for plot in draw_plots(RunReport.from_dict(found.to_dict()))}


def test_validated_rounds_are_kept_and_others_have_no_key(tmp_path):
    before = report(None, scores(3.0, acc=0.25))
    save_report(before, tmp_path)
    assert RunReport.load(tmp_path) == before
    lines = before.to_dict()["rounds"]
    assert "validation" not in lines[0]
    assert lines[1]["validation"]["mean"] == {"answer_nll": 3.0, "n": 64, "acc": 0.25}
    assert "validation" not in report(validation=None).to_dict()


def test_curves_tell_their_numbers_in_words():
    found = plots(report(scores(3.0, acc=0.25, acc_norm=0.5), None, scores(2.5, acc=0.5, acc_norm=0.75)))
    assert found["Validation loss per round"].endswith("nats per token. round 1: 3.000, round 3: 2.500.")
    assert found["Validation accuracy per round"].endswith("acc_norm, per cent. round 1: 50.000, round 3: 75.000.")
    found = plots(report(scores(3.0, acc=0.25)))  # a task without acc_norm
    assert found["Validation accuracy per round"].endswith("acc, per cent. round 1: 25.000.")
    assert set(plots(report(scores(3.0)))) == {"Training loss per round", "Validation loss per round"}
    assert set(plots(report(None))) == {"Training loss per round"}


def test_pages_show_columns_and_which_round_was_fused(tmp_path):
    found = report(None, scores(3.0, acc=0.25))
    text = to_markdown(found, tmp_path)
    head, _, first, second = next(block for block in text.split("\n\n") if "validation NLL" in block).splitlines()
    assert [cell.strip() for cell in head.split("|")][4:6] == ["validation NLL", "validation acc"]
    assert [cell.strip() for cell in first.split("|")][4:6] == ["–", "–"]  # noqa: RUF001
    assert [cell.strip() for cell in second.split("|")][4:6] == ["3.000", "25.0 %"]
    hint = (
        "Validation: the fused model on 64 training rows that no client owns. "
        "The state after round 3 was fused, the best by mean answer_nll."
    )
    assert hint in text
    assert hint in to_html(found, tmp_path)
    last = ValidationReport("proxy", "acc", "last", 64, 2)
    assert "The state after round 2 was fused, the last." in to_markdown(report(None, validation=last), tmp_path)
    failed = ValidationReport("proxy", "acc", "last", 64)
    assert "no client owns.\n" in to_markdown(report(None, validation=failed), tmp_path)
    assert "was fused" not in to_markdown(report(None, validation=failed), tmp_path)
