"""A run that goes on in the browser: what the page says, who gets it, and that it ends with the run."""

import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch
from urllib.parse import urlsplit

import pytest

from fedproxy.errors import ConfigError
from fedproxy.files import write_json
from fedproxy.locks import in_use, locked
from fedproxy.pipeline import watch as module
from fedproxy.pipeline.now import NowFile
from fedproxy.pipeline.watch import Watched, serving, watch
from fedproxy.report import main
from fedproxy.reporting.watched import MOST_ROWS, Now, clients_now, read_now, read_rounds

HOSTILE = "<script>alert(1)</script><img src=x onerror=y>\x1b[2J\u202e"


def record(number, clients=("a", "b"), **more):
    return {
        "round": number, "clients": list(clients), "train_loss": 4.0 / number, "upload_bytes": 2048,
        "download_bytes": 4096, "seconds": 3.0, **more,
    }  # fmt: skip


def journal(run, records):
    run.mkdir(exist_ok=True)
    (run / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records))


def got(address, path=None, host=None):
    """Status, headers and body of a request."""
    parts = urlsplit(address)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=10)
    connection.request("GET", path or parts.path, headers={"Host": host} if host else {})
    answer = connection.getresponse()
    return answer.status, dict(answer.getheaders()), answer.read().decode()


def test_a_client_is_late_by_what_it_took_in_the_round_before():
    now = Now(
        "federate", 0.0, 2, 3, 100.0, ["a", "b", "c", "d", "e"], {"d": 9.0}, {"e": "it lies"}, {"a": 4.0, "b": 8.0}
    )
    # 12 s waited: 1.5 * 4 + 5 = 11 for a, 1.5 * 8 + 5 = 17 for b; c took no part before
    rows = [row[:2] for row in clients_now(now, 112.0).rows]
    assert rows == [["a", "late"], ["b", "waited for"], ["c", "waited for"], ["e", "dropped"], ["d", "answered"]]


def test_many_clients_are_cut(tmp_path):
    now = Now("federate", 0.0, 1, 1, 100.0, [f"c{number:04}" for number in range(5000)])
    assert len(clients_now(now, 101.0).rows) == MOST_ROWS


def test_the_file_says_where_a_run_is_and_never_ends_it(tmp_path):
    file = NowFile(tmp_path / "now.json")
    file.stage("federate")
    file.round(1, 2, ["a", "b", "c"])
    for client, reason in (("a", None), ("b", "it failed"), ("c", None), ("c", "too long")):
        file.client(client, reason)
    file.round(2, 2, ["a", "b"])
    now = read_now((tmp_path / "now.json").read_bytes())
    assert (now.stage, now.round, now.rounds, list(now.clients)) == ("federate", 2, 2, ["a", "b"])
    assert list(now.before) == ["a"]
    assert (tmp_path / "now.json").stat().st_mode & 0o077 == 0
    file.remove()
    file.remove()
    assert not (tmp_path / "now.json").exists()
    (tmp_path / "file").write_text("")
    NowFile(tmp_path / "file" / "now.json").stage("fuse")


def test_answers_in_quick_succession_are_all_told(tmp_path, monkeypatch):
    monkeypatch.setattr("fedproxy.pipeline.now._WRITE_S", 0.05)
    path = tmp_path / "now.json"
    file, until = NowFile(path), time.monotonic() + 20
    file.round(1, 2, ["a", "b", "c"])
    for client in ("a", "b"):  # the third is waited for
        file.client(client)
    while len(read_now(path.read_bytes()).answered) < 2:
        assert time.monotonic() < until
        time.sleep(0.01)
    file.client("c")
    file.remove()
    time.sleep(0.2)
    assert not path.exists()


@pytest.mark.parametrize(
    "text",
    [b"", b"[]", b'{"round": "x"}', b'{"since": 1e999}', b'{"clients": {"a": 1}}', b"\xff", b'{"before": {"a": null}}'],
)
def test_a_file_that_says_something_else_says_nothing(text):
    assert read_now(text) == Now()


def test_lines_that_are_no_rounds_are_left_out():
    lines = [json.dumps(record(1)).encode(), b"{", b'{"round": "two"}', b"[" * 100_000, json.dumps(record(3)).encode()]
    lines.append(json.dumps(record(4, cosine=[[1.0]])).encode())  # of two clients
    assert [line.round for line in read_rounds(lines)] == [1, 3]


def test_the_page_has_rounds_clients_losses_and_bytes(tmp_path):
    run = tmp_path / "my-run"
    journal(run, [record(1), record(2, dropped={"c": "late: it took more than 5 s"})])
    now = Now("federate", time.time(), 3, 9, time.time() - 60, ["a", "b"], {"a": 2.0}, before={"b": 3.0})
    with locked(run):
        write_json(run / "server" / "now.json", asdict(now))
        page = Watched(run).page()
    for words in ("<h1>my-run</h1>", "tuning with the clients", "2 of 9", "4.0 KiB", "8.0 KiB", "late: it took more"):
        assert words in page
    for words in ("Round 3: 1 of 2 clients answered", "it took 3.0 s in the round before", "Training loss"):
        assert words in page
    assert '<meta http-equiv="refresh" content="2">' in page
    assert "on no longer" in Watched(run).page()
    assert 'http-equiv="refresh"' not in Watched(run).page()


def test_foreign_text_is_text(tmp_path):
    run = tmp_path / "run"
    journal(run, [record(1, [HOSTILE, "b"], dropped={HOSTILE: HOSTILE})])
    with locked(run):
        now = {"stage": HOSTILE, "round": 2, "rounds": 9, "clients": [HOSTILE], "dropped": {HOSTILE: HOSTILE}}
        write_json(run / "server" / "now.json", now)
        page = Watched(run).page()
    assert "&lt;script&gt;" in page
    assert not any(words in page for words in ("<script", "<img", "\x1b", "\u202e"))


def test_a_journal_is_read_from_its_end_and_again_only_when_it_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOST_JOURNAL_BYTES", 1000)
    run = tmp_path / "run"
    journal(run, [record(number) for number in range(1, 101)])
    watched, made = Watched(run), []
    real = module.Finished.of
    monkeypatch.setattr(module.Finished, "of", lambda rounds: made.append(rounds) or real(rounds))
    for _ in range(3):
        page = watched.page()
    first = made[0][0].round
    assert "<dd>100</dd>" in page  # rounds, not those that were read
    assert f"{first - 1} earlier rounds are not shown" in page
    assert f"<dt>Uploaded since round {first}</dt><dd>{2 * len(made[0])}.0 KiB</dd>" in page
    assert [rounds[-1].round for rounds in made] == [100]
    assert len(made[0]) < 10
    journal(run, [record(number) for number in range(1, 102)])
    watched.page()
    assert made[-1][-1].round == 101


def test_a_pipe_in_the_journals_place_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "rounds.jsonl")
    assert "No round is over yet" in Watched(tmp_path).page()


def test_it_is_served_on_loopback_alone_to_who_knows_the_address(tmp_path):
    with locked(tmp_path / "run"), serving(Watched(tmp_path / "run")) as address:
        parts = urlsplit(address)
        assert parts.hostname == "127.0.0.1"
        assert len(parts.path) > 20
        status, headers, page = got(address)
        assert (status, headers["Cache-Control"]) == (200, "no-store")
        assert headers["Content-Security-Policy"].startswith("default-src 'none'")
        assert "<h1>run</h1>" in page
        assert got(address, host=f"localhost:{parts.port}")[0] == 200
        assert got(address, path="/")[0] == got(address, path=parts.path + "../server/now.json")[0] == 404
        assert got(address, host=f"evil.example:{parts.port}")[0] == got(address, host="127.0.0.1:1")[0] == 421
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=10)
        connection.request("POST", parts.path)
        assert connection.getresponse().status == 501
    with pytest.raises(OSError, match="refused"):
        socket.create_connection((parts.hostname, parts.port), timeout=5)


def test_a_browser_that_hangs_up_leaves_no_traceback(tmp_path, capfd):
    watched, over = Watched(tmp_path / "run"), threading.Event()
    watched.page = lambda: "x" * (20 << 20)
    with serving(watched) as address:
        place, done = urlsplit(address), module._Server.shutdown_request
        with patch.object(module._Server, "shutdown_request", lambda *own: (done(*own), over.set())):
            reader = socket.create_connection((place.hostname, place.port), timeout=5)
            reader.sendall(f"GET {place.path} HTTP/1.0\r\nHost: 127.0.0.1:{place.port}\r\n\r\n".encode())
            reader.recv(1)
            reader.close()
            assert over.wait(10)
    assert "Traceback" not in capfd.readouterr().err


def test_it_ends_with_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_LAST_LOOK_S", 0.0)
    said, run = [], tmp_path / "run"
    held = locked(run)
    held.__enter__()
    (run / "keep").write_text("")

    def say(line):
        if line.startswith("http"):
            assert got(line.split()[0])[0] == 200
            held.__exit__(None, None, None)
        said.append(line)

    watch(run, say)
    assert said[-1] == f"the run in {run} goes on no longer"


def test_what_does_not_run_is_not_watched(tmp_path):
    with pytest.raises(ConfigError, match=r"no run goes on in .*nowhere; start the run first"):
        main(["--watch", str(tmp_path / "nowhere")])
    (tmp_path / "report.html").write_text("")
    with pytest.raises(ConfigError, match=r"it has a report: .*report.html"):
        main([str(tmp_path), "--watch"])
    with pytest.raises(ConfigError, match="--watch takes one run's folder, got 2"):
        main(["--watch", "a", "b"])


def test_a_lock_of_a_dead_process_holds_nothing(tmp_path):
    code = "import os, sys; from fedproxy.locks import locked; it = locked(sys.argv[1]); it.__enter__(); os._exit(0)"
    subprocess.run([sys.executable, "-c", code, tmp_path / "run"], check=True)
    assert (tmp_path / "run" / ".fedproxy.lock").is_file()
    assert not in_use(tmp_path / "run")
    elsewhere = {"pid": 1, "host": "another-machine", "boot": "x"}
    (tmp_path / "run" / ".fedproxy.lock").write_text(json.dumps(elsewhere))
    assert in_use(tmp_path / "run")


def test_a_real_run_is_watched_from_its_proxy_to_its_end(tmp_path):
    run = tmp_path / "runs" / "tiny"
    words = ["recipe=fedproxy_tiny", f"output_dir={run}", "federation.rounds=4", "evaluation.limit=4"]
    fit = subprocess.Popen(
        [sys.executable, "-m", "fedproxy.fit", *words], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    seen = []
    try:
        until = time.monotonic() + 300
        while not in_use(run) and time.monotonic() < until:
            time.sleep(0.05)
        watched = Watched(run)
        with serving(watched) as address:
            while watched.runs() and time.monotonic() < until:
                seen.append(got(address)[2])
                time.sleep(0.05)
            last = got(address)[2]
        assert fit.wait(timeout=300) == 0
    finally:
        fit.kill()
    assert any("clients answered" in page and "tiny_sums" in page for page in seen)
    assert any("1 of 4" in page for page in seen)
    assert "on no longer" in last
    assert "Training loss" in last
    assert not Path(run, "server", "now.json").exists()
