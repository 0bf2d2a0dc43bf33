"""A federation over Flower on loopback, with TLS and node authentication on: what it promises, seen to hold."""

import os
import random
import re
import ssl
import time
import urllib.error
import urllib.request

import pytest
from safetensors.torch import load_file

from .loopback import Command, Loopback, skip_where_it_cannot_run

pytestmark = [pytest.mark.flower, pytest.mark.timeout(900)]
SITES = {"ward_a": ("tiny_colors", "tiny_sums"), "ward_b": ("tiny_opposites", "tiny_places")}
SMALL = ("data.rows_per_task=24", "evaluation.tasks=[]")
PATIENT = ("engine.wait_s=180", "engine.attempts=4", "federation.round_timeout_s=120")
LOOKED_AT = [
    *("data", "model", "key", "signing keys", "Flower", "authority"),
    *("certificate", "connection", "clock", "front door"),
]
WINDOW_S = 8.0
"""Seconds after a round's end in which the next kills lie: about as long as a round takes."""


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    skip_where_it_cannot_run()
    made = Loopback(tmp_path_factory.mktemp("f"), SITES)
    yield made
    made.close()


def state(folder):
    return load_file(sorted(folder.glob("checkpoints/round_*"))[-1] / "state.safetensors")


def get(federation, path):
    context = ssl.create_default_context(cafile=federation.folder / "hub/keys/ca.crt")
    try:
        with urllib.request.urlopen(
            f"https://localhost:{federation.port}{path}", context=context, timeout=10
        ) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_every_command_of_the_deployment_page_does_what_it_says(federation):
    said = federation.outputs
    found = [line.partition(":")[0] for line in said["fedproxy.site check"].splitlines()]
    assert found[:-1] == [f"ok   {what}" for what in LOOKED_AT]
    assert "all is well" in said["fedproxy.site check"]
    assert "site 'ward_a' is up; hub: localhost" in said["fedproxy.site status"]
    assert "hub: up" in said["fedproxy.hub status"]
    assert all(f"site '{name}'" in said["fedproxy.hub status"] for name in SITES)
    assert federation.fit


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


def test_a_stranger_is_not_let_in_and_is_told_within_a_minute(federation):
    federation.add("stranger")
    try:
        federation.start("stranger").until("is up").until("the hub does not let it in", 60)
    finally:
        assert federation.sites.pop("stranger").end() == 143


class Kills:
    """Kills processes of a federation at random moments of a run, and starts again what nobody else would."""

    def __init__(self, federation, words, seed):
        self.federation, self.words, self.random = federation, words, random.Random(seed)
        self.fit = federation.run(*words)

    @property
    def rounds(self):
        """Rounds that are over."""
        return max(map(int, re.findall(r"^round (\d+)/", self.fit.said, flags=re.MULTILINE)), default=0)

    def until_round(self, number, seconds):
        end = time.monotonic() + seconds
        while self.rounds < number:
            if self.fit.process.poll() == 0:
                return
            assert self.fit.process.poll() is None, self.fit.said
            assert time.monotonic() < end, f"no round {number} in {seconds} s:\n{self.fit.said}"
            time.sleep(0.1)

    def wave(self, kinds):
        """Kill processes of these kinds, each at a moment of its own, and wait until the round at hand is over."""
        moments = sorted((self.random.uniform(0, WINDOW_S), kind) for kind in kinds)
        began = time.monotonic()
        for moment, kind in moments:
            time.sleep(max(0.0, began + moment - time.monotonic()))
            assert self.fit.process.poll() is None, self.fit.said
            getattr(self, f"kill_{kind}")()
        self.until_round(self.rounds + 1, 420)

    def kill_site(self):
        self.federation.sites["ward_a"].kill()
        self.federation.start("ward_a").until("is up")

    def kill_supernode(self):
        for pid in self.federation.pids("flower-supernode", "ward_b"):
            os.kill(pid, 9)

    def kill_superlink(self):
        for pid in self.federation.pids("flower-superlink"):
            os.kill(pid, 9)

    def kill_fit(self):
        self.fit.kill()
        self.fit = self.federation.run(*self.words, "resume=auto")


ONCE = [("site", "supernode", "superlink"), ("fit",)]
TEN_TIMES = [(kind,) for kind in ("site", "supernode", "superlink", "fit")] * 10


@pytest.mark.parametrize(
    "waves",
    [
        pytest.param(ONCE, id="once"),
        pytest.param(TEN_TIMES, id="ten_times", marks=[pytest.mark.slow, pytest.mark.timeout(7200)]),
    ],
)
def test_all_four_kinds_of_process_are_killed_and_the_bytes_are_those_of_one_process(waves, federation, tmp_path):
    rounds = (f"federation.rounds={1 + 2 * len(waves)}", *SMALL)
    kills = Kills(federation, (*rounds, *PATIENT, f"output_dir=killed_{len(waves)}"), seed=len(waves))
    one = ("recipe=fedproxy_tiny", "engine.name=in_process", "engine.threads=1", "output_dir=here")
    here = Command(tmp_path, "fedproxy.fit", *one, *rounds, name="here")
    try:
        kills.until_round(1, 240)
        for wave in waves:
            kills.wave(wave)
        assert kills.fit.process.wait(timeout=300 + 60 * len(waves)) == 0, kills.fit.said
        assert here.process.wait(timeout=300) == 0, here.said
    finally:
        kills.fit.kill()
        here.kill()
    ours, theirs = state(federation.folder / f"killed_{len(waves)}"), state(tmp_path / "here")
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)


def test_nothing_is_left_when_all_have_ended(federation):
    assert federation.close() == [143] * 3
    deadline = time.monotonic() + 10
    while any(map(federation.pids, ("flower-super", "flwr-", "nginx"))):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert not (federation.folder / "hub/link.json").exists()
    assert not (federation.folder / "ward_a/state.json").exists()
