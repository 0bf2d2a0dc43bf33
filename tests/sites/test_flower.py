"""A federation over Flower on loopback, with TLS and node authentication on: what it promises, seen to hold."""

import json
import os
import re
import shlex
import shutil
import ssl
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from safetensors.torch import load_file

from .loopback import FLOWER, Command, Loopback, free_port, run, skip_where_it_cannot_run

pytestmark = [pytest.mark.flower, pytest.mark.timeout(900)]
SITES = {"ward_a": ("tiny_colors", "tiny_sums"), "ward_b": ("tiny_opposites", "tiny_places")}
SMALL = ("recipe=fedproxy_tiny", "data.rows_per_task=24", "evaluation.tasks=[]")
FAR = ("engine.name=flower", "engine.hub=hub", "data.partition.name=sites", "data.partition.clients=4")


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    skip_where_it_cannot_run()
    made = Loopback(tmp_path_factory.mktemp("f"), SITES)
    yield made
    made.close()


def state(folder, rounds):
    return load_file(folder / f"checkpoints/round_{rounds:04d}/state.safetensors")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """What one process ends in after 4 rounds."""
    folder = tmp_path_factory.mktemp("h")
    words = ("engine.name=in_process", "engine.threads=1", "federation.rounds=4", "output_dir=here")
    code, said = run(folder, "fedproxy.fit", *SMALL, *words)
    assert code == 0, said
    return folder / "here"


def get(federation, path):
    context = ssl.create_default_context(cafile=federation.folder / "hub/keys/ca.crt")
    try:
        with urllib.request.urlopen(
            f"https://localhost:{federation.port}{path}", context=context, timeout=10
        ) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/health", 200),
        ("/v1/control/start-run", 404),
        ("/v1/runtime/pull-task-input", 404),
        ("/", 404),
        ("/docs", 404),
    ],
)
def test_the_front_door_publishes_what_sites_need_alone(path, status, federation):
    assert get(federation, path) == status


def test_a_site_checks_itself_before_anything_federated_runs(federation):
    code, said = run(federation.folder, "fedproxy.site", "check", "ward_a.yaml")
    assert code == 0, said
    assert all(f"ok   {what}" in said for what in ("data", "model", "key", "certificate", "connection", "clock"))


def test_a_stranger_is_not_let_in_and_is_told_within_a_minute(federation):
    federation.add("stranger", ("tiny_sums",))
    began = time.monotonic()
    site = federation.start("stranger").until("the hub does not let it in", 60)
    assert time.monotonic() - began < 60
    site.end()
    del federation.sites["stranger"]


def test_all_four_kinds_of_process_are_killed_and_the_bytes_are_those_of_one_process(federation, here):
    words = (*SMALL, *FAR, "federation.rounds=4", "output_dir=there", "engine.wait_s=180")
    fit = Command(federation.folder, "fit", *words)
    fit.until("round 1/4", 240)
    federation.sites["ward_a"].kill()
    federation.start("ward_a")
    fit.until("round 2/4", 300)
    for name in ("flower-supernode", "flower-superlink"):
        for pid in federation.pids(name)[:1]:
            os.kill(pid, 9)
    fit.until("round 3/4", 400)
    fit.kill()
    fit = Command(federation.folder, "fit", *words, "resume=auto")
    assert fit.process.wait(timeout=300) == 0, fit.said
    ours, theirs = state(federation.folder / "there", 4), state(here, 4)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)


ALONE = ("aggregator.name=fedavg", "regularizer.name=none")


def commands_of(page):
    text = "\n".join(re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL))
    return [shlex.split(line)[2:] for line in text.splitlines() if line.startswith("python -m fedproxy")]


def test_every_command_of_the_deployment_page_does_what_it_says(tmp_path):
    skip_where_it_cannot_run()
    port, up = free_port(), []
    page = Path(__file__).parent.parent.parent / "docs/deploy.md"
    try:
        for module, *words in commands_of(page):
            words = [word.replace("hub.example:8443", f"localhost:{port}") for word in words]
            words = [word.replace("hub.example", "localhost") for word in words]
            if words[0] == "up":
                up.append(Command(tmp_path, module.removeprefix("fedproxy."), *words).until("is up"))
                continue
            if words[:2] == ["init", "hub.yaml"]:
                words += [f"port={port}", f"superlink_port={free_port()}"]
            elif words[0] == "init":
                words += [f"node_port={free_port()}"]
            elif words[0] == "check":
                shutil.copy(tmp_path / "hub/keys/ca.crt", tmp_path / "ward_a/keys/ca.crt")
                rows = [json.dumps({"prompt": f"{k} plus one is", "target": f"{k + 1}"}) for k in range(40)]
                (tmp_path / "rows.jsonl").write_text("\n".join(rows))
            elif module == "fedproxy.fit":
                words = [
                    word.replace("=fedproxy_llama", "=fedproxy_tiny").replace("clients=2", "clients=1")
                    for word in words
                ]
                words += ["federation.rounds=1", "evaluation.tasks=[]"]
            code, said = run(tmp_path, module, *words)
            assert code == 0, (module, words, said)
            if words[0] == "init":
                file = tmp_path / words[1]
                file.write_text(
                    file.read_text().replace("accelerator: auto", "accelerator: cpu") + f"flower: {FLOWER}\n"
                )
    finally:
        for command in reversed(up):
            command.end()


def test_nothing_is_left_when_all_have_ended(federation):
    for name in SITES:
        assert federation.sites[name].end() == 143
    assert federation.hub.end() == 143
    time.sleep(1)
    assert not [word for word in ("flower-super", "flwr-", "nginx") if federation.pids(word)]
    assert not (federation.folder / "hub/link.json").exists()
    assert Path(federation.folder / "there/report.json").exists()
