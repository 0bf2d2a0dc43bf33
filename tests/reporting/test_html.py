import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure

from fedproxy.reporting import RoundReport, RunInfo, RunReport
from fedproxy.reporting.html import cell, to_html
from fedproxy.reporting.pages import save_report
from fedproxy.reporting.plots import draw_plots, heat_map

from .report_samples import full_report, save_samples


def plain(report):
    return RunReport.from_dict(report.to_dict())


class Balance(HTMLParser):
    """Collects tags left open or closed without having been opened."""

    VOID = ("meta", "link", "br")

    def __init__(self):
        super().__init__()
        self.open, self.wrong, self.ids = [], [], []

    def handle_starttag(self, tag, attributes):
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def test_page_is_whole_self_contained_and_escaped(tmp_path):
    report = replace(full_report(), notes=["<script>alert(1)</script>"])
    page = to_html(report, tmp_path)
    balance = Balance()
    balance.feed(page)
    assert (balance.open, balance.wrong) == ([], [])
    assert not re.search(r"https?://|//[a-z]+\.|@import|url\((?!#)", page)
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "b&lt;i&gt;ob" in page
    assert "<i>ob" not in page


def test_ids_are_unique_although_several_plots_share_the_page(tmp_path):
    balance = Balance()
    balance.feed(to_html(full_report(), tmp_path))
    assert sorted(set(balance.ids)) == sorted(balance.ids)


def test_every_plot_has_a_title_a_description_and_no_colours_of_its_own_but_the_heat_map():
    plots = draw_plots(plain(full_report()))
    assert [plot.title for plot in plots] == [
        "Scores per task",
        "Training loss per round",
        "Conflict between clients per round",
        "Cosine of client updates, round 3",
        "Block Influence",
    ]
    for plot in plots:
        svg = ElementTree.fromstring(plot.svg)
        ids = {element.get("id"): element for element in svg.iter() if element.get("id")}
        title, description = (ids[name] for name in svg.get("aria-labelledby").split())
        assert (svg.get("role"), title.text, description.text) == ("img", plot.title, plot.description)
        if "Cosine" not in plot.title:
            assert not re.search(r"(fill|stroke): #(?!(fff|none))", plot.svg)
            assert "var(--series-" in plot.svg


def test_descriptions_carry_the_numbers():
    words = {plot.title: plot.description for plot in draw_plots(plain(full_report()))}
    assert "Removed: 2, 3." in words["Block Influence"]
    assert "round 1: 0.400, round 2: 0.300, round 3: 0.200" in words["Conflict between clients per round"]
    # client losses 3/t + .0 .1 .2 .3: mean 3/t + .15
    assert "round 1: 3.150, round 2: 1.650, round 3: 1.150" in words["Training loss per round"]
    assert "anna & co and b<i>ob \N{MINUS SIGN}0.10" in words["Cosine of client updates, round 3"]


def test_same_report_same_page(tmp_path):
    assert to_html(full_report(), tmp_path) == to_html(full_report(), tmp_path)


def test_scores_that_are_all_0_are_drawn_without_a_warning(recwarn):
    report = full_report()
    zero = {"acc_norm": 0.0, "acc_norm_stderr": 0.0, "n": 2}
    draw_plots(plain(replace(report, scores={"fused": {"easy": zero}})))
    assert not [str(warning.message) for warning in recwarn]


def test_an_unknown_cell_of_a_heat_map_is_not_the_colour_of_0():
    axes = Figure().add_subplot()
    heat_map(axes, [[1.0, None], [0.0, 1.0]], "RdBu", low=-1.0, aspect="equal")
    assert axes.images[0].get_array()[:, :, 3].tolist() == [[1.0, 0.0], [1.0, 1.0]]


@pytest.mark.parametrize("metric", ["acc", "answer_nll"])
def test_a_model_without_the_first_task_is_in_the_legend_too(metric):
    scores = {"target": {"easy": {metric: 0.5}, "hard": {metric: 0.25}}, "fused": {"easy": {}, "hard": {metric: 0.75}}}
    (drawn,) = draw_plots(plain(RunReport(RunInfo("r", "m", "completed", 1, ""), scores)))
    assert re.findall(r">(target|fused)<", drawn.svg) == ["target", "fused"]


@pytest.mark.parametrize("clients", [1, 20])
def test_one_client_and_many_clients(tmp_path, clients):
    report = full_report(tuple(f"c{index}" for index in range(clients)), rounds=1)
    titles = [plot.title for plot in draw_plots(plain(report))]
    assert ("Cosine of client updates, round 1" in titles) == (clients > 1)
    assert to_html(report, tmp_path)


def test_many_clients_are_summed_up_in_the_description():
    words = {
        p.title: p.description for p in draw_plots(plain(full_report(tuple(f"c{i:02d}" for i in range(20)), rounds=1)))
    }
    # 20 * 19 / 2 pairs, all -.1; ties go by name
    assert (
        "190 pairs; lowest c00 and c01 \N{MINUS SIGN}0.10; highest c18 and c19 \N{MINUS SIGN}0.10"
        in words["Cosine of client updates, round 1"]
    )


def test_plots_without_data_are_left_out(tmp_path):
    failed = RunReport(RunInfo("x", "fedproxy", "failed", 1, "2026-01-02T03:04:05Z", error="a & b"))
    assert draw_plots(plain(failed)) == []
    page = to_html(failed, tmp_path)
    assert "This run failed</h2><p>a &amp; b</p>" in page
    assert "<figure>" not in page
    rounds = [RoundReport(1, ("a", "b"), train_loss=float("nan")), RoundReport(2, ("a", "b"), train_loss=2.0)]
    (loss,) = draw_plots(plain(replace(failed, rounds=rounds)))
    assert "round 1: \N{EN DASH}, round 2: 2.000" in loss.description


@pytest.mark.filterwarnings("error")
def test_names_are_plain_text_in_plots_whatever_they_hold():
    page = plain(full_report(("$\\frac$", "北京", "x_y^{")))
    svg = {plot.title: plot.svg for plot in draw_plots(page)}["Training loss per round"]
    for name in ("$\\frac$", "北京", "x_y^{"):
        assert f">{name}<" in svg


def test_changes_are_set_apart_by_sign():
    assert cell("40.0 ± 3.0 (+10.0)") == '<span>40.0 ± 3.0</span> <span class="change up">+10.0</span>'
    assert 'class="change down">\N{MINUS SIGN}1.0<' in cell("40.0 (\N{MINUS SIGN}1.0)")
    assert cell("0.20 (+0.07 to +0.33)") == "0.20 (+0.07 to +0.33)"
    assert cell("<b>") == "&lt;b&gt;"


def test_kept_samples_add_the_paired_table_and_the_interval_of_the_headline(tmp_path):
    report = full_report()
    save_samples(tmp_path)
    save_report(report, tmp_path)
    page, text = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    assert "question by question" in page
    assert re.search(r"difference of \*\*\+\d+\.\d \(95 % interval \+", text)


def test_interval_of_other_samples_is_kept_out_of_the_headline(tmp_path):
    save_samples(tmp_path, fused=0.8)
    save_report(full_report(), tmp_path)
    assert re.search(r"difference of \*\*\+\d+\.\d ± \d", (tmp_path / "report.md").read_text())


def test_unusable_samples_become_a_note(tmp_path):
    save_samples(tmp_path)
    (tmp_path / "evaluation" / "proxy.samples.jsonl").write_text("{half")
    save_report(full_report(), tmp_path)
    assert "Paired differences are left out" in (tmp_path / "report.md").read_text()
    assert "Paired" not in (tmp_path / "report.json").read_text()
