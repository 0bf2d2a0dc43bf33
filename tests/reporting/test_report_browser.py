"""Reports, comparisons and watched runs in headless Chromium: desktop and phone width, light, dark and on paper."""

import html
import json
import re
import shutil
import struct
import subprocess
import zlib
from dataclasses import asdict

import pytest

from fedproxy.files import plain, write_text
from fedproxy.locks import locked
from fedproxy.pipeline.watch import Watched, serving
from fedproxy.reporting.comparison.pages import write_comparison
from fedproxy.reporting.pages import save_report
from fedproxy.reporting.watched import Finished, Now, watch_page

from .comparison.comparison_samples import make_comparison, make_runs
from .report_samples import full_report, save_samples

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--enable-logging=stderr",
    "--disable-background-networking", "--disable-sync", "--disable-component-update", "--disable-extensions",
    "--host-resolver-rules=MAP * ~NOTFOUND",
]  # fmt: skip
SIZES = {"desktop": 1280, "phone": 390}
PLOTS = {"report": 5, "comparison": 6, "watch": 3}

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH (apt-get install chromium)"),
]


@pytest.fixture(scope="module", params=PLOTS)
def page(request, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "a-run"
    if request.param == "comparison":
        runs = make_runs(run)
        return write_comparison(make_comparison(runs), runs, run)[1]
    if request.param == "watch":
        names = list(full_report().rounds[-1].clients)
        now = Now("federate", 0.0, 9, 9, 60.0, names, {names[0]: 5.0}, {names[1]: "it failed"}, {names[2]: 20.0})
        text = watch_page("a-run", Finished.of(full_report().rounds), now, runs=True, clock=200.0)
        still = re.sub(r'<meta http-equiv="refresh"[^>]*>', "", text)  # it would begin again while it is looked at
        assert still != text
        return write_text(run / "watch.html", still)
    save_samples(run)
    save_report(full_report(), run)
    return run / "report.html"


@pytest.fixture
def chromium(tmp_path):
    def run(page, *flags):
        address = page if isinstance(page, str) else page.as_uri()
        return subprocess.run(
            [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *flags, address],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )

    return run


def console(done):
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def framed(page, folder, width, script=""):
    """Return a page that shows the report in a frame of ``width``: headless windows cannot be as narrow as a phone."""
    wrapper = folder / "framed.html"
    source = html.escape(page.read_text(), quote=True)
    frame = f'<iframe style="border:0;width:{width}px;height:900px" srcdoc="{source}"></iframe>'
    wrapper.write_text(f'<!doctype html><body style="margin:0">{frame}<script>{script}</script></body>')
    return wrapper


def test_the_check_for_console_errors_would_find_one(chromium, tmp_path):
    bad = tmp_path / "bad.html"
    bad.write_text("<!doctype html><script>nothing.here()</script>")
    assert len(console(chromium(bad, "--dump-dom"))) == 1


@pytest.mark.parametrize("width", SIZES.values(), ids=SIZES)
def test_no_console_error_no_request_and_nothing_sticks_out(chromium, page, tmp_path, width):
    script = """
      const frame = document.querySelector("iframe");
      frame.onload = () => {
        const view = frame.contentDocument, root = view.documentElement;
        const wide = [...view.querySelectorAll("main *")].filter(
          (e) => !e.closest(".scroll, pre, svg") && e.getBoundingClientRect().right > root.clientWidth + 0.5);
        document.title = [root.clientWidth, root.scrollWidth, wide.length, view.querySelectorAll("figure svg").length,
          Math.min(...[...view.querySelectorAll("figure svg")].map((e) => e.getBoundingClientRect().width)),
          frame.contentWindow.performance.getEntriesByType("resource").length].join(" ");
      };
    """
    done = chromium(framed(page, tmp_path, width, script), "--dump-dom", "--virtual-time-budget=5000")
    assert console(done) == []
    found = re.search(r"<title>(\d+) (\d+) (\d+) (\d+) ([\d.]+) (\d+)</title>", done.stdout)
    client, scroll, wide, plots, narrowest, requests = map(float, found.groups())
    assert client == width
    assert scroll <= client
    assert wide == 0
    assert plots == PLOTS[page.stem]
    assert requests == 0
    assert narrowest >= 280  # drawn at 317 CSS pixels (4.4 inches at 72): text keeps about its size


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_screenshots_show_a_page_in_both_colour_schemes(chromium, page, tmp_path, dark):
    shot = tmp_path / "shot.png"
    flags = ["--blink-settings=preferredColorScheme=0"] if dark else []
    chromium(page, f"--screenshot={shot}", "--window-size=1280,2000", *flags)
    data = shot.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (1280, 2000)
    assert len(data) > 50_000  # an empty page of this size compresses to less than 20 kB
    corner = first_pixel(data)
    assert sum(corner) < 150 if dark else sum(corner) > 600


def test_a_watched_run_is_served_to_a_browser(chromium, tmp_path):
    run = tmp_path / "a-run"
    with locked(run), serving(Watched(run)) as address:
        lines = [json.dumps(plain(asdict(line))) for line in full_report().rounds]
        write_text(run / "rounds.jsonl", "\n".join(lines) + "\n")
        done = chromium(address, "--dump-dom", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
    assert console(done) == []
    assert "<h1>a-run</h1>" in done.stdout
    assert "Training loss per round" in done.stdout


def first_pixel(data):
    """Return red, green and blue of a PNG's top left pixel, which no line filter changes (8 bits a channel)."""
    chunks, at = b"", 8
    while at < len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        chunks += data[at + 8 : at + 8 + size] if kind == b"IDAT" else b""
        at += size + 12
    return tuple(zlib.decompressobj().decompress(chunks, 8)[1:4])


def test_it_prints(chromium, page, tmp_path):
    chromium(page, f"--print-to-pdf={tmp_path / 'report.pdf'}", "--no-pdf-header-footer")
    data = (tmp_path / "report.pdf").read_bytes()
    assert data.startswith(b"%PDF-")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", data)) <= 6
