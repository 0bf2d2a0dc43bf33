"""Names, labels, reasons and notes of others stay text in every page: no image, link, HTML, formula or table break."""

import csv
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import yaml
from markdown_it import MarkdownIt

from fedproxy.reporting import RoundReport, RunInfo, model_card
from fedproxy.reporting.comparison.pages import to_csv, write_comparison
from fedproxy.reporting.comparison.view import RunLine
from fedproxy.reporting.html import to_html
from fedproxy.reporting.markdown import code_block, escape, markdown_table, to_markdown
from fedproxy.reporting.run_comparison import comparison_page
from fedproxy.reporting.tables import LONGEST, Table
from tests.reporting.comparison.comparison_samples import make_comparison, make_runs
from tests.reporting.report_samples import full_report

HOSTILE = [
    "![x](http://evil.example/p.png)",
    "[x](javascript:alert(1))",
    "[x]: http://evil.example",
    "[x][y] ![z]",
    "<img src=x onerror=alert(1)>",
    "<http://evil.example>",
    "<!-- gone",
    "http://evil.example www.evil.example evil@example.com @everyone",
    "\\[x](http://evil.example)",
    "\\\\![x](http://evil.example)",
    "a | b || c",
    "`code` ``` $x$ **bold**",
    "# heading",
    "line\n\n# another\n```\n| a | b |\n|---|---|",
    "\x1b[31mred\x1b[0m \x1b]8;;http://evil.example\x07link\x1b]8;;\x07",
    "&lt;script&gt; &#91;x](http://evil.example)",
    "</td></table><script>alert(1)</script>",
    "\u202eright to left \u200b\ud800",
    "=HYPERLINK(1)",
    "x" * 100_000,
]
_LIVE = {"link_open", "image", "html_inline", "html_block", "s_open"}


def tokens(text):
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        yield token
        yield from token.children or ()


def assert_dead(text):
    assert not [token for token in tokens(text) if token.type in _LIVE]
    assert not re.search(r"https?://|\bwww\.|[A-Za-z]@[a-z]", re.sub(r"\\.", "", re.sub(r"\\:", "", text)))
    assert "\x1b" not in text
    text.encode("utf-8")


def hostile_report(text):
    line = RoundReport(
        1, (text, "b"), train_loss=(2.0, 3.0), weights={text: 0.4, "b": 0.6}, cosine=((1.0, 0.5), (0.5, 1.0)),
        dropped={f"c {text}": f"late: {text}"}, validation={text: {"acc": 0.5}, "mean": {"acc": 0.5}},
    )  # fmt: skip
    report = full_report()
    scores = {model: {text: tasks["mean"], **tasks} for model, tasks in report.scores.items()}
    return replace(
        report,
        run=RunInfo(text, text, "failed", 1, text, 3.0, error=text),
        rounds=(line,),
        notes=(text,),
        scores=scores,
        client_scores={text: scores},
        provenance=replace(
            report.provenance, versions={text: text}, git_commit=text, data_sha256={text: text}, hardware={text: text}
        ),
    )


@pytest.mark.parametrize("text", HOSTILE)
def test_report_md_shows_it_as_text(tmp_path, text):
    page = to_markdown(hostile_report(text), tmp_path / "run")
    assert_dead(page)
    calm = to_markdown(hostile_report("calm"), tmp_path / "run")
    kinds = [token.type for token in tokens(page) if token.type in ("heading_open", "table_open", "td_open", "fence")]
    assert kinds == [t.type for t in tokens(calm) if t.type in ("heading_open", "table_open", "td_open", "fence")]
    assert len(page) < 200_000


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, sorted(name for name, _ in attributes)))

    def handle_comment(self, data):
        if not data.startswith((" ", "[")) or "gone" in data:
            self.found.append(("comment", []))


def tags(page):
    """Return the page's own elements; plots aside, whose ids and paths depend on their labels' widths."""
    parser = Tags()
    parser.feed(re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL))
    return parser.found


@pytest.fixture(scope="module")
def calm_tags(tmp_path_factory):
    return tags(to_html(hostile_report("calm"), tmp_path_factory.mktemp("calm") / "run"))


@pytest.mark.parametrize("text", HOSTILE)
def test_report_html_shows_it_as_text(tmp_path, text, calm_tags):
    page = to_html(hostile_report(text), tmp_path / "run")
    assert tags(page) == calm_tags
    assert not re.search(r"<(script|img|iframe|object|a) (?!href=\"report)|onerror=alert\(1\)>|<script", page)
    assert "\x1b" not in page
    page.encode("utf-8")
    assert len(page) < 2_000_000


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return make_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def calm_comparison(runs, tmp_path_factory):
    """Elements of the page of a comparison whose names are plain words, as many as in the hostile ones."""
    found = make_comparison(runs)
    calm = replace(
        found, title="a", command="b", notes=("c",), settings={label_of(found): {"d": "e"}},
        runs=[RunLine("f", 1, "failed", None, "g"), RunLine("h", 2, "not run")],
    )  # fmt: skip
    quiet = {name: [replace(own, report=hostile_report("calm")) for own in given] for name, given in runs.items()}
    written = write_comparison(calm, quiet, tmp_path_factory.mktemp("calm"))
    return tags(next(path.read_text() for path in written if path.suffix == ".html"))


def label_of(found):
    return next(iter(found.settings), found.analysis.methods[0].label)


@pytest.mark.parametrize("text", HOSTILE)
def test_comparison_pages_show_it_as_text(tmp_path, runs, calm_comparison, text):
    found = make_comparison(runs)
    found = replace(
        found,
        title=text,
        command=f"python {text}",
        notes=(text,),
        settings={label_of(found): {text: text}},
        runs=[RunLine(text, 1, "failed", None, text), RunLine(text, 2, "not run")],
    )
    records = {name: [replace(own, report=hostile_report(text)) for own in given] for name, given in runs.items()}
    files = {path.suffix: path.read_text(encoding="utf-8") for path in write_comparison(found, records, tmp_path)}
    assert_dead(files[".md"].partition("## Repeat it")[0])
    assert [token.type for token in tokens(files[".md"])].count("fence") == 1
    assert tags(files[".html"]) == calm_comparison
    assert "<script" not in files[".html"]
    for row in csv.reader(io.StringIO(files[".csv"])):
        assert not [cell for cell in row if cell[:1] in "=@\t\r" and cell]


@pytest.mark.parametrize(
    "text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", " =1", "\n=1", "\uff1d1", "=cmd|' /C calc'!A0"]
)
def test_a_spreadsheet_takes_no_text_for_a_formula(runs, text):
    named = {text: [replace(own, report=hostile_report(text)) for own in next(iter(runs.values()))]}
    rows = list(csv.reader(io.StringIO(to_csv(named))))
    for row in rows[1:]:
        assert row[0].startswith("'")
        assert row[1].startswith("'")
        assert row[4] == "mean" or row[4].startswith("'") or not set(row[4]) & set("=+-@\t\r")


def test_numbers_of_the_table_stay_numbers(runs):
    (label, given), *_ = runs.items()
    report = given[0].report
    scores = {"fused": {"mean": {"acc": -0.5, "answer_nll": -1e-5, "n": 3}}}
    rows = list(
        csv.DictReader(io.StringIO(to_csv({label: [replace(given[0], report=replace(report, scores=scores))]})))
    )
    assert [(row["acc"], row["answer_nll"], row["n"], row["seed"]) for row in rows] == [
        ("-0.5", "-1e-05", "3", str(given[0].seed))
    ]


@pytest.mark.parametrize("text", HOSTILE)
def test_model_cards_show_it_as_text_and_keep_their_front_matter(text):
    card = model_card(
        "fused", {"fused": {text: {"acc": 0.5}}}, method=text, base_model=f"{text}\n---\nx", notes=(text,)
    )
    _, front, body = card.split("---\n", 2)
    matter = yaml.safe_load(front)
    assert list(matter) == ["library_name", "pipeline_tag", "tags", "base_model"]
    assert isinstance(matter["base_model"], str)
    assert_dead(body)


@pytest.mark.parametrize("text", HOSTILE)
def test_the_page_on_two_runs_shows_it_as_text(text):
    from fedproxy.reporting.pairing import RunDifferences

    assert_dead(comparison_page(text, f"b {text}", RunDifferences([], [], [text])))


def test_plain_words_stay_as_they_are():
    for text in ("arc_easy", "38.5 ± 2.0 (+9.2)", "< 0.001", "clients to server, all rounds", "a-b_c.d/e", "r0 = 0.8"):
        assert escape(text) == text
    assert markdown_table(Table(["task", "acc"], [["arc_easy", "-0.5"]])).splitlines()[2] == "| arc_easy | -0.5 |"


def test_a_cell_is_one_printable_line_of_bounded_length():
    table = Table(["a\nb"], [["x" * 10**6], [""], ["\x00"]])
    assert table.head == ["a b"]
    assert [len(row[0]) for row in table.rows[:2]] == [LONGEST, 0]
    assert all(cell.isprintable() for row in table.rows for cell in row)


def test_a_command_cannot_end_its_block():
    block = code_block(["echo '```\n# heading'"])
    assert [token.type for token in tokens(block)] == ["fence"]
    assert block.splitlines()[0] == "````sh"
