"""A site's own process: what it is asked is checked against its policy, and what it says quotes no row."""

import hashlib
import json
import os
import shutil
import socket
import stat
import subprocess
import threading
import time
from contextlib import suppress

import pytest
import torch

import fedproxy
from fedproxy.errors import CheckpointError, ClientError, ConfigError, DataError
from fedproxy.messages import Collect, Dropped, Rewind
from fedproxy.privacy.registration import FOLDER, registered
from fedproxy.protocol import Broadcast, ClientUpdate, Kept
from fedproxy.seeding import ClientSeeds
from fedproxy.sites.policy import NotAllowedError, Policy
from fedproxy.sites.resident import Resident
from fedproxy.sites.service import Service
from fedproxy.sites.signing import register_site
from fedproxy.sites.site_config import SitePlace
from fedproxy.sites.site_rows import SiteRows
from fedproxy.sites.site_run import Answered, SiteRun, reason, without_paths
from fedproxy.wire.bundle import Bundle
from fedproxy.wire.frames import NOTHING, receive, send
from fedproxy.wire.messages import PROTOCOL, Ask, Setup, Train, told

RUN = "ab" * 16
SECRET = "Mrs Miller, born 1950"
SETUP = {
    "proxy": "a" * 64, "proxy_bytes": 10, "dtype": "float32", "trainable": {"name": "lora", "r": 2},
    "max_input_tokens": 8, "max_target_tokens": 8, "long_rows": "cut", "quantization": "none", "plugins": [],
}  # fmt: skip


@pytest.fixture
def place(tmp_path):
    def make(text="", rows=4):
        lines = (json.dumps({"prompt": f"{SECRET} {k}?", "target": f"answer {k}"}) for k in range(rows))
        (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
        (tmp_path / "site.yaml").write_text(f"name: ward\nclients: {{ward: {{files: {{rows: rows.jsonl}}}}}}\n{text}")
        return SitePlace.read(tmp_path / "site.yaml")

    return make


@pytest.fixture
def nothing(tmp_path):
    (tmp_path / "payload").write_bytes(b"")
    return tmp_path / "payload"


def resident_of(place):
    return Resident(place, SiteRows(place.rows(), place.folder / "rows"))


def hello(**changes):
    line = {"kind": "hello", "run": RUN, "protocol": PROTOCOL, "version": fedproxy.__version__, "setup": SETUP}
    return {**line, **changes}


def test_hello_says_names_counts_and_nothing_of_a_row(place, nothing):
    head, payload = resident_of(place()).serve(hello(), nothing)
    assert head["greeting"]["clients"] == {"ward": 4}
    assert head["greeting"]["have"] == 0
    assert payload.size == 0
    assert "Miller" not in json.dumps(head)


def test_a_client_reads_its_own_format_and_holds_rows_back(tmp_path, nothing):
    turns = [{"role": "user", "content": f"{SECRET}?"}, {"role": "assistant", "content": "well"}]
    lines = [json.dumps({"messages": [{**turns[0], "content": f"{SECRET} {k}?"}, turns[1]]}) for k in range(10)]
    (tmp_path / "talks.jsonl").write_text("\n".join(lines))
    options = "{files: {talks: talks.jsonl}, format: {name: chat}, holdout: 0.3}"
    (tmp_path / "site.yaml").write_text(f"name: ward\nclients: {{ward: {options}}}\n")
    site = resident_of(SitePlace.read(tmp_path / "site.yaml"))
    head, _ = site.serve(hello(), nothing)
    assert head["greeting"]["clients"] == {"ward": 7}
    assert head["greeting"]["converse"] is True
    before = site.rows.sha256
    assert resident_of(SitePlace.read(tmp_path / "site.yaml")).rows.sha256 == before
    (tmp_path / "site.yaml").write_text(f"name: ward\nclients: {{ward: {options.replace('0.3', '0.2')}}}\n")
    assert resident_of(SitePlace.read(tmp_path / "site.yaml")).rows.sha256 != before


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("peers: {other: abc}", "peers.other must be the 64 digits"),
        ("clients: {ward: {files: {rows: rows.jsonl}, format: {name: chatt}}}", "did you mean 'chat'"),
        ("clients: {ward: {files: {rows: rows.jsonl}, end_token: perhaps}}", "end_token"),
    ],
)
def test_what_a_site_file_cannot_say_is_named(text, line, tmp_path):
    clients = "" if "clients" in text else "clients: {ward: {tasks: [a]}}\n"
    (tmp_path / "site.yaml").write_text(f"name: ward\n{clients}{text}\n")
    with pytest.raises(ConfigError, match=line):
        SitePlace.read(tmp_path / "site.yaml")


def test_a_site_pins_its_peers_keys_and_shows_its_own(place):
    site = place(f"peers: {{other: {'ab' * 32}}}")
    shown = register_site(site)
    assert shown == register_site(site)
    assert registered(site.folder / FOLDER) == {"other": b"\xab" * 32, "ward": bytes.fromhex(shown["ward"])}
    register_site(place(f"peers: {{third: {'cd' * 32}}}"))
    assert registered(site.folder / FOLDER) == {"third": b"\xcd" * 32, "ward": bytes.fromhex(shown["ward"])}
    register_site(place())  # a peer that was taken out is trusted no longer
    assert registered(site.folder / FOLDER) == {"ward": bytes.fromhex(shown["ward"])}
    with pytest.raises(ConfigError, match=r"peers.ward is a client of this site"):
        register_site(place(f"peers: {{ward: {'ab' * 32}}}"))


@pytest.mark.parametrize(
    ("change", "error", "line"),
    [
        ({"version": "0.0.1"}, "version", "0.0.1 at the server"),
        ({"protocol": 2}, "version", "at the server"),
        ({"setup": {**SETUP, "trainable": {"name": "blocks"}}}, "refused", "policy.trainables allows lora, not blocks"),
        ({"setup": {**SETUP, "plugins": ["os"]}}, "refused", "policy.plugins does not list os"),
        ({"setup": {**SETUP, "proxy_bytes": 1 << 40}}, "refused", "policy.largest_mib is 2048"),
        ({"setup": {**SETUP, "proxy": "../../x"}}, "failed", "proxy cannot be"),
        ({"run": "../x"}, "failed", "of which run"),
        ({"kind": "shell"}, "unknown", "does not know this kind"),
        ({"kind": "get", "file": "x"}, "unknown", "say hello first"),
        ({"kind": "train"}, "unknown", "say hello first"),
        ({"kind": "put", "piece": {}}, "unknown", "say hello first"),
    ],
)
def test_what_the_policy_does_not_allow_or_nobody_knows_is_refused_in_one_line(change, error, line, place, nothing):
    head, payload = resident_of(place()).serve(hello(**change), nothing)
    assert head["error"] == error
    assert line in head["why"]
    assert payload.size == 0


def test_every_message_is_in_the_owners_journal(place, nothing):
    resident = resident_of(place())
    resident.serve(hello(), nothing)
    resident.serve(hello(kind="shell\x1b[2J"), nothing)
    for round_ in (7, "x" * 1_000_000):  # what is no number is not the server's to fill the owner's disk with
        resident.serve(hello(kind="train", task={"round": round_}), nothing)
    lines = [json.loads(line) for line in (place().folder / "journal.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["hello", "shell", "train", "train"]
    assert [line["round"] for line in lines] == [None, None, 7, None]
    assert lines[0]["outcome"] == "done"


def test_rows_that_changed_since_the_run_began_end_it_for_this_site(place, nothing):
    resident_of(place()).serve(hello(), nothing)
    head, _ = resident_of(place(rows=5)).serve(hello(), nothing)
    assert head == {"error": "changed"}
    head, _ = resident_of(place(rows=4)).serve(hello(), nothing)
    assert "greeting" in head


def test_an_error_that_quotes_a_row_reaches_the_server_as_its_kind_alone(place, nothing, monkeypatch):
    def fail(*_):
        raise ValueError(f"cannot tokenise {SECRET}")

    monkeypatch.setattr(Setup, "parse", fail)
    head, _ = resident_of(place()).serve(hello(), nothing)
    assert head == {"error": "failed", "why": "ValueError"}


def test_a_full_disk_is_told_as_such(place, nothing, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedproxy.wire.inbox.Inbox.have", fail)
    head, _ = resident_of(place()).serve(hello(), nothing)
    assert head["error"] == "full"


@pytest.fixture
def small_disk(tmp_path):
    """Return a folder on a disk of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root can make a small disk, where mounting is allowed")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_full_is_told_and_the_file_goes_on_when_there_is_room(place, small_disk, tmp_path):
    resident, part = resident_of(place(f"folder: {small_disk / 'site'}")), tmp_path / "part"
    part.write_bytes(b"x" * 700_000)
    resident.serve(hello(), part)

    def put(offset):
        piece = piece_of(part.read_bytes(), 2_100_000, offset, SETUP["proxy"])
        return resident.serve(hello(kind="put", piece=piece), part)[0]

    assert put(0) == {"have": 700_000}
    (small_disk / "other").write_bytes(b"x" * 900_000)
    assert told(put(700_000)).startswith("its disk is full")
    (small_disk / "other").unlink()
    assert put(700_000) == {"have": 1_400_000}


def test_a_disk_that_is_full_behind_an_error_of_ours_is_told_as_such(place, nothing, monkeypatch):
    def fail(*_):
        try:
            raise OSError(28, "No space left on device")
        except OSError as error:
            raise CheckpointError("/x/y cannot be written") from error

    monkeypatch.setattr("fedproxy.wire.inbox.Inbox.have", fail)
    head, _ = resident_of(place()).serve(hello(), nothing)
    assert told(head) == "its disk is full"


def test_what_a_run_keeps_stays_for_the_latest_runs_alone(place, nothing):
    resident = resident_of(place("keep_runs: 2\n"))
    for number in range(4):
        resident.serve(hello(run=f"{number:032x}"), nothing)
    assert len(list((place().folder / "runs").iterdir())) == 2


JOB = {"epochs": 1, "parts": []}


@pytest.mark.parametrize(
    ("rules", "round_", "job", "line"),
    [
        ({"most_rounds": 2}, 3, JOB, "policy.most_rounds is 2, this is round 3"),
        ({"most_epochs": 2}, 1, {"epochs": 3}, "policy.most_epochs is 2, the round asks for 3"),
        ({}, 1, {"epochs": "1"}, "policy.most_epochs"),
        ({}, 1, {}, "policy.most_epochs"),
        ({"most_clip": 1.0}, 1, JOB, "policy.most_clip is 1.0"),
        ({"most_clip": 1.0}, 1, {"epochs": 1, "parts": [{"name": "clip_noise", "clip": 2.0}]}, "policy.most_clip"),
    ],
)
def test_a_round_that_asks_for_more_is_refused_by_rule(rules, round_, job, line):
    with pytest.raises(NotAllowedError, match=line):
        Policy(**rules).check_round(round_, job)


def test_a_round_within_the_rules_is_allowed():
    parts = [{"name": "clip_noise", "clip": 0.5, "noise": 1.0}]
    Policy(most_clip=1.0).check_round(100, {"epochs": 3, "parts": parts})


BUDGET = {"name": "privacy", "unit": "client", "epsilon": 3.0, "delta": 1e-6, "noise_at": "client", "clip": 1.0}
KEEPS = {"most_epsilon": 3, "evaluate": False}


def asked(*parts, **changes):
    return {"epochs": 1, "parts": [*parts, {**BUDGET, **changes}]}


@pytest.mark.parametrize(
    ("rules", "job", "line"),
    [
        ({}, JOB, "policy.most_epsilon is 3; use privacy.unit with privacy.epsilon of at most that"),
        ({}, asked(BUDGET), "policy.most_epsilon is 3; use privacy.unit"),  # two of them
        ({}, asked(epsilon=8.0), "policy.most_epsilon is 3; use privacy.epsilon of at most that"),
        ({}, asked(epsilon=None), "policy.most_epsilon is 3; use privacy.epsilon"),
        ({}, asked(epsilon=float("nan")), "policy.most_epsilon is 3; use privacy.epsilon"),
        ({}, asked(delta=0.9), "policy.most_delta is 1e-05; use privacy.delta of at most that"),
        ({}, asked(delta=None), "policy.most_delta is 1e-05"),
        ({"unit": "example"}, asked(), "policy.unit is example; use privacy.unit=example"),
        ({}, asked(unit="none"), "policy.unit is any; use privacy.unit=client or example"),
        ({}, asked(noise_at="server"), "asks for noise at the site; use privacy.noise_at=client"),
        ({}, asked(sampling="without_replacement"), "counts on no draw of clients"),
        ({}, asked(test_seed=1), "noise that nobody foresees; use privacy.test_seed=null"),
        ({}, asked({"name": "statistics"}), "does not account for statistics; remove it"),
        ({}, asked({"name": "personal"}), "does not account for personal; remove it"),
        ({"secure": True}, asked(), "policy.secure lets no update leave that is not masked"),
        ({"most_clip": 0.5}, asked(), "policy.most_clip is 0.5; use parts.clip_noise.clip or privacy.clip"),
    ],
)
def test_a_site_asks_for_a_budget_whatever_the_server_says(rules, job, line):
    with pytest.raises(NotAllowedError, match=line):
        Policy(**KEEPS, **rules).check_round(1, job)


def test_private_rounds_within_the_rules_are_allowed():
    Policy(**KEEPS, unit="client", most_clip=1.0).check_round(1, asked())
    Policy(**KEEPS, unit="example").check_round(1, asked(unit="example", sampling="poisson"))
    Policy(**KEEPS, secure=True).check_round(1, asked({"name": "secure_sum"}))


def test_rows_that_are_split_have_no_budget():
    setup = Setup.parse({**SETUP, "long_rows": "split"})
    with pytest.raises(NotAllowedError, match=r"policy.most_epsilon protects rows, and data.long_rows=split"):
        Policy(**KEEPS).check_setup(setup)
    Policy(**KEEPS, unit="client").check_setup(setup)


def test_a_budget_and_scores_that_nobody_accounts_for_do_not_go_together():
    with pytest.raises(ConfigError, match=r"policy.evaluate must be false where policy.most_epsilon is set"):
        Policy(most_epsilon=3.0)
    with pytest.raises(ConfigError, match=r"policy.most_delta must be in \(0, 1\), got 1.0"):
        Policy(**KEEPS, most_delta=1.0)


def test_losses_and_statistics_leave_only_where_they_may():
    update = ClientUpdate("ward", {"a": torch.ones(1)}, 3, 4, train_loss=0.5, seconds=2.0)
    assert Policy().allowed(update) is update
    counts = Policy(figures="counts").allowed(update)
    assert (counts.train_loss, counts.seconds, counts.num_examples) == (None, 0.0, 3)
    charged = ClientUpdate("ward", {}, extras={"privacy": {"release": torch.ones(3)}})
    assert Policy().allowed(charged) is charged
    with pytest.raises(NotAllowedError, match=r"policy.statistics does not let 'fisher' leave"):
        Policy().allowed(ClientUpdate("ward", {}, extras={"fisher": {}}))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("policy: {most_rounds: 0}", "policy.most_rounds must be at least 1"),
        ("policy: {least_noise: 1}", "policy.least_noise: unknown key"),
        ("policy: {figures: all}", "policy.figures must be one of losses, counts"),
        ("policy: {epochs: 3}", "policy.epochs: unknown key"),
        ("workers: 0", "workers must be"),
        ("node_port: 70000", "node_port must be from 1 to 65535"),
        ("server: {address: 3}", "server.address must be a text"),
    ],
)
def test_a_site_file_that_cannot_be_meant_is_refused_with_its_key(text, line, place):
    with pytest.raises(ConfigError, match=f"site file .*site.yaml: {line}"):
        place(text)


def test_a_client_with_too_few_rows_takes_no_part(place):
    site = place()
    with pytest.raises(DataError, match=r"client 'ward' has fewer rows than policy.least_rows=5"):
        SiteRows(site.rows(), site.folder / "rows", least=5)


def test_the_same_question_is_answered_the_same_without_training_again(place, tmp_path):
    site = place()
    run = SiteRun(tmp_path / "run", site.config, SiteRows(site.rows(), site.folder / "rows"))
    answered = Answered.find(run.folder / "answers", "key")
    answered.begin()
    (answered.folder / "00000").write_bytes(b"update")
    answered.answers = {"ward": {"file": "00000"}}
    answered.finish()
    again = Answered.find(run.folder / "answers", "key")
    assert again.is_whole
    assert again.bundle.sha256 == answered.bundle.sha256
    assert run.answered(again.bundle.sha256).size == again.bundle.size
    for key in ("b", "c"):
        Answered.find(run.folder / "answers", key).begin()
    Answered.find(run.folder / "answers", "d").begin()
    assert not Answered.find(run.folder / "answers", "key").is_whole  # the latest stay


def test_a_question_that_is_asked_again_has_a_file_for_each_client(tmp_path):
    """A reply that was lost: what answers the question now is made anew, a key share for example."""
    for value in (1.0, 2.0):
        answered = Answered.find(tmp_path / "answers", "key")
        answered.begin()
        answered.take([ClientUpdate(client, {"share": torch.full((1,), value)}) for client in ("a", "b")])
        answered.finish()
    files = [answered.answers[client]["file"] for client in ("a", "b")]
    assert sorted(files) == sorted(answered.bundle.files)
    for client, file in zip(("a", "b"), files, strict=True):
        update = ClientUpdate.load(answered.folder / file)
        assert (update.client_id, update.delta["share"].tolist()) == (client, [2.0])


def talk(service, data):
    with socket.socket(socket.AF_UNIX) as opened:
        opened.settimeout(10)
        opened.connect(str(service.path))
        try:
            opened.sendall(data)
            opened.shutdown(socket.SHUT_WR)
            return opened.makefile("rb").readline()
        except OSError:
            return b""  # it was thrown out while it still spoke


@pytest.fixture
def service(tmp_path):
    made = Service(lambda head, path: ({"got": head, "bytes": path.stat().st_size}, NOTHING), tmp_path / "socket")
    yield made
    made.close()


def test_what_a_killed_process_left_of_messages_goes(tmp_path):
    (tmp_path / "messages_old").mkdir()
    (tmp_path / "messages_old/part").write_bytes(b"x")
    Service(lambda head, path: ({}, NOTHING), tmp_path / "socket").close()
    assert not list(tmp_path.glob("messages_*"))


def test_a_relay_that_drips_is_cut_off(tmp_path, monkeypatch):
    monkeypatch.setattr("fedproxy.sites.service._READ_S", 0.5)
    service = Service(lambda head, path: ({"ok": 1}, NOTHING), tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as opened:
        opened.connect(str(service.path))
        began = time.monotonic()
        opened.settimeout(10)

        def drip():
            with suppress(OSError):
                for _ in range(100):
                    opened.sendall(b" ")
                    time.sleep(0.1)

        threading.Thread(target=drip, daemon=True).start()
        assert json.loads(opened.makefile("rb").readline())["error"] == "not_ours"
        assert time.monotonic() - began < 5
    service.close()


def test_a_trouble_of_the_system_does_not_end_the_service(tmp_path, monkeypatch):
    monkeypatch.setattr("fedproxy.sites.service._AGAIN_S", 0.01)
    service = Service(lambda head, path: ({"ok": 1}, NOTHING), tmp_path / "socket")
    real, failed = service._socket, []

    class Troubled:
        def accept(self):
            if len(failed) < 3:
                failed.append(1)
                raise OSError(24, "Too many open files")
            return real.accept()

        def close(self):
            real.close()

    service._socket = Troubled()
    for _ in range(2):  # the first is still taken by the accept that waited
        assert json.loads(talk(service, b'{"size":0}\n'))["ok"] == 1
    assert len(failed) == 3
    service.close()
    assert not service._thread.is_alive() or service._thread.join(2) is None


def test_a_folder_with_a_long_path_gets_its_socket_elsewhere(tmp_path):
    folder = tmp_path / ("long" * 20)
    folder.mkdir()
    service = Service(lambda head, path: ({"ok": 1}, NOTHING), folder / "socket")
    assert json.loads(talk(service, b'{"size":0}\n'))["ok"] == 1
    place = service.path.parent
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    service.close()
    assert not place.exists()


def test_the_socket_is_the_owners_alone(service):
    assert stat.S_IMODE(os.stat(service.path).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(service.path.parent).st_mode) == 0o700


def test_a_message_is_answered_and_what_is_none_is_refused(service):
    assert json.loads(talk(service, b'{"kind":"x","size":2}\nab')) == {"got": {"kind": "x"}, "bytes": 2, "size": 0}
    for bad in (b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b'{"size":99999999999}\n', b'{"size":5}\nab', b"\x00" * 3_000_000):
        assert json.loads(talk(service, bad) or '{"error":"not_ours","size":0}')["error"] == "not_ours"
    assert json.loads(talk(service, b'{"size":0}\n'))["bytes"] == 0


def test_a_round_trip_through_the_socket_keeps_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 100_000)
    bundle = Bundle({"a": tmp_path / "a"})
    service = Service(lambda head, path: ({"ok": 1}, bundle.part(0, bundle.size)), tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as opened, opened.makefile("rwb") as stream:
        opened.connect(str(service.path))
        send(stream, {"kind": "get"})
        assert receive(stream, tmp_path / "got", most=1 << 20) == {"ok": 1}
    assert (tmp_path / "got").read_bytes() == b"".join(bundle.read(0, bundle.size))
    service.close()


def test_a_broadcast_of_another_round_than_its_task_is_refused(place, tmp_path, nothing):
    site = place()
    run = SiteRun(tmp_path / "run", site.config, SiteRows(site.rows(), site.folder / "rows"))
    Broadcast(2, {"a": torch.ones(1)}, {"epochs": 1}).save(tmp_path / "sent")
    (tmp_path / "bundle").write_bytes(b"".join(Bundle({"0": tmp_path / "sent"}).read(0, 1 << 20)))
    task = Train(1, {"ward": {}}, {"ward": 0}, "a" * 64, 1.0)
    with pytest.raises(ClientError, match="of another round than the task"):
        run.train(task, tmp_path / "bundle", 1.0)


def piece_of(data, total=None, offset=0, file=None):
    part = hashlib.sha256(data).hexdigest()
    return {"file": file or part, "total": total or len(data), "offset": offset, "part": part}


def test_parts_are_taken_within_a_run_alone_and_files_that_nothing_needs_go(place, tmp_path):
    resident, payload = resident_of(place()), tmp_path / "part"
    payload.write_bytes(b"x" * 100)

    def put(file, **more):
        return resident.serve(hello(kind="put", piece=piece_of(b"x" * 100, 1000, file=file * 64), **more), payload)[0]

    assert put("b")["error"] == "unknown"
    resident.serve(hello(), payload)
    assert put("b", run="cd" * 16)["error"] == "unknown"
    assert put(SETUP["proxy"][0]) == {"have": 100}
    for file in "bcdef":
        assert put(file) == {"have": 100}
    kept = {path.name[0] for path in (place().folder / "inbox").iterdir()}
    assert kept == {SETUP["proxy"][0], "f"}  # what is set up, and what came last
    resident.serve(hello(kind="put", piece={}), payload)
    assert resident.serve(hello(kind="put", piece={}), payload)[0]["why"].startswith("a part does not say which file")


def test_workers_that_train_are_not_taken_away_by_another_run_or_setup(place, nothing):
    resident = resident_of(place())
    resident.serve(hello(), nothing)
    with resident._working(1.0) as left:
        assert 0 < left <= 1.0
        assert "greeting" in resident.serve(hello(), nothing)[0]
        for other in ({"run": "cd" * 16}, {"setup": {**SETUP, "proxy_bytes": 11}}):
            assert resident.serve(hello(**other), nothing)[0] == {"error": "busy"}
    assert "greeting" in resident.serve(hello(run="cd" * 16), nothing)[0]


def task_of(folder, round_=1, seed=1, **job):
    """Return a task for client ward, and its bundle."""
    Broadcast(round_, {"a": torch.ones(1)}, {"epochs": 1, **job}).save(folder / "broadcast")
    bundle = Bundle({"0": folder / "broadcast"})
    (folder / "bundle").write_bytes(b"".join(bundle.read(0, 1 << 20)))
    seeds = {"ward": ClientSeeds(1, [2], seed)}
    own = Broadcast(1, {}, {"epochs": 1}, all_seeds=seeds).addressed_to("ward").beside()
    return Train(round_, {"ward": own}, {"ward": 0}, bundle.sha256, 1.0), folder / "bundle"


def run_of(site, folder, pool):
    run = SiteRun(folder, site.config, SiteRows(site.rows(), site.folder / "rows"))
    run.set_up(Setup.parse(SETUP), folder)
    run._sites = pool
    return run


def test_rounds_are_counted_over_all_runs_and_whatever_number_the_server_gives_them(place, tmp_path):
    site, pool = place("policy: {most_rounds: 3, most_epochs: 1}"), FakePool()
    first, second = (run_of(site, tmp_path / name, pool) for name in ("a", "b"))
    for run, seed in ((first, 1), (first, 2), (second, 2)):
        run.train(*task_of(tmp_path, seed=seed), 1.0)
        run.train(*task_of(tmp_path, seed=seed), 1.0)  # asked again: counted once
    with pytest.raises(NotAllowedError, match=r"most_epochs"):
        second.train(*task_of(tmp_path, seed=3, epochs=2), 1.0)
    for run in (first, second):
        with pytest.raises(NotAllowedError, match=r"policy.most_rounds is 3, the site has trained in as many"):
            run.train(*task_of(tmp_path, seed=3), 1.0)
    assert len(json.loads((site.folder / "trained_rounds.json").read_text())) == 3


def test_tensors_that_nothing_clips_do_not_leave_where_updates_must_be_clipped(place, tmp_path):
    run = run_of(place("policy: {most_clip: 1.0}"), tmp_path / "run", FakePool())
    with pytest.raises(NotAllowedError, match=r"policy.most_clip lets no personal tensors leave"):
        run.ask(Ask({"ward": Collect(Kept()).plain()}, None, 1.0), None, 1.0)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("memory of ward in /home/x/site/runs/ab/store/ward.json is damaged", "memory of ward in ward.json is damaged"),
        ("cannot read '/srv/a b/c'", "cannot read 'a b/c'"),
        ("3/4 of rows, and/or 1 / 2", "3/4 of rows, and/or 1 / 2"),
    ],
)
def test_what_the_server_is_told_holds_no_path_of_this_machine(text, told):
    assert without_paths(text) == told
    assert reason(CheckpointError(text)) == told


class FakePool:
    """Notes the time that clients are given, and uses some of it."""

    def __init__(self, spends=0.0):
        self.spends, self.given, self.sent = spends, [], []

    def run(self, broadcast, clients, *, timeout_s):
        self.sent.append(broadcast)
        self.given.append(timeout_s)
        time.sleep(self.spends)
        yield from (Dropped(client, "late") for client in clients)

    def ask(self, messages, *, timeout_s):
        self.given.append(timeout_s)
        yield from (Dropped(client, "late") for client in messages)

    def close(self):
        pass


def test_a_rounds_time_is_one_for_all_of_its_files_and_a_question_has_one_too(place, tmp_path):
    site = place()
    run = SiteRun(tmp_path / "run", site.config, SiteRows(site.rows(), site.folder / "rows"))
    run.set_up(Setup.parse(SETUP), tmp_path)
    run._sites = pool = FakePool(spends=0.3)
    paths = {}
    for name in "01":
        Broadcast(1, {"a": torch.ones(1)}, {"epochs": 1}).save(tmp_path / name)
        paths[name] = tmp_path / name
    (tmp_path / "bundle").write_bytes(b"".join(Bundle(paths).read(0, 1 << 20)))
    own = Broadcast(1, {}, {"epochs": 1}, all_seeds={"ward": ClientSeeds(1, [2])}).addressed_to("ward").beside()
    task = Train(1, {"ward": own, "other": own}, {"ward": 0, "other": 1}, "a" * 64, 1.0)
    run.train(task, tmp_path / "bundle", 1.0)
    assert pool.given[0] == pytest.approx(1.0, abs=0.05)
    assert pool.given[1] == pytest.approx(0.7, abs=0.1)
    run.ask(Ask({"ward": Rewind(1, Kept()).plain()}, None, 7.0), None, 5.0)
    assert pool.given[2] == 5.0
