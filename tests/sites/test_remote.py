"""What sites answer is taken for what it is: files, sums and refusals, and nothing that was not asked for."""

import hashlib
import json

import pytest
import torch
from safetensors import SafetensorError

from fedproxy.config import load_config
from fedproxy.errors import CheckpointError, ClientError, ConfigError
from fedproxy.federation.engines.flower import Flower
from fedproxy.messages import Dropped, Evaluate, Sums, UpdateFile
from fedproxy.pipeline.checks import check_components
from fedproxy.protocol import Broadcast, Kept
from fedproxy.seeding import ClientSeeds
from fedproxy.wire import link as wire
from fedproxy.wire.bundle import Bundle, unpack
from fedproxy.wire.frames import NOTHING
from fedproxy.wire.inbox import Inbox, Piece
from fedproxy.wire.link import Link, Terms
from fedproxy.wire.remote import RemoteSites

from .fake_courier import FakeCourier

EVALUATE = Evaluate(Kept(), {"tuned": {"w": torch.arange(3.0)}})


class FakeSite:
    """Takes files in as a site does, and answers what it is told to."""

    def __init__(self, folder, clients, answer, part=1 << 20):
        self.folder, self.clients, self.answer, self.part = folder, clients, answer, part
        self.inbox, self.asked, self.bundle = Inbox(folder / "inbox"), [], None

    def serve(self, head, payload):
        if head["kind"] == "hello":
            clients = dict.fromkeys(self.clients, 5)
            facts = {"clients": clients, "version": "1", "clock": 0.0, "have": 0, "converse": False}
            return {"greeting": facts}, NOTHING
        if head.get("piece"):
            self.inbox.add(Piece.parse(head["piece"], most=1 << 30), payload)
        if head["kind"] == "put":
            return {"have": self.inbox.have(head["piece"]["file"])}, NOTHING
        if head["kind"] == "get":
            return self.piece(head["offset"])
        self.asked.append(head)
        said = self.answer(self, head)
        if self.bundle is None:
            return {"answers": said, "piece": None}, NOTHING
        line, part = self.piece(0)
        return {"answers": said, **line}, part

    def piece(self, offset):
        part = self.bundle.part(offset, self.part)
        sha = hashlib.sha256(b"".join(part.pieces())).hexdigest()
        return {"piece": vars(Piece(self.bundle.sha256, self.bundle.size, offset, sha))}, part

    def sends(self, **files):
        paths = {}
        for name, data in files.items():
            paths[name] = self.folder / name
            paths[name].write_bytes(data)
        self.bundle = Bundle(paths)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name in ("_LOOK_S", "_PAUSE_S", "_AGAIN_S"):
        monkeypatch.setattr(wire, name, 0.0)


def reached(tmp_path, answers, **terms):
    sites = {}
    for name, (clients, answer) in answers.items():
        (tmp_path / name).mkdir()
        sites[name] = FakeSite(tmp_path / name, clients, answer, terms.get("part_bytes", 1 << 20))
    courier = FakeCourier({name: site.serve for name, site in sites.items()}, tmp_path / "line")
    link = Link(lambda: courier, Terms(**{"wait_s": 5, **terms}), tmp_path / "link")
    remote = RemoteSites(link, "ab" * 16, sorted(sites), tmp_path / "link")
    remote.greet()
    return remote, sites, courier


def broadcast(*clients, each=None):
    seeds = {client: ClientSeeds(1, [number]) for number, client in enumerate(clients)}
    return Broadcast(3, {"a": torch.ones(500)}, {"epochs": 1}, each=each, all_seeds=seeds)


def updates(site, head):
    site.sends(**{f"{k:05d}": f"update of {name}".encode() * 100 for k, name in enumerate(head["task"]["own"])})
    return {name: {"file": f"{k:05d}"} for k, name in enumerate(head["task"]["own"])}


def test_a_client_that_no_site_has_is_named(tmp_path):
    remote, _, _ = reached(tmp_path, {"x": ("a", updates)})
    with pytest.raises(ClientError, match=r"no site has a client 'b' any more; have its site hold it again"):
        list(remote.run(broadcast("a", "b"), ["a", "b"]))


@pytest.mark.parametrize("part", [1 << 20, 700])
def test_a_round_goes_out_and_comes_back_in_parts_of_any_size(part, tmp_path):
    remote, sites, courier = reached(tmp_path, {"x": ("a", updates), "y": ("bc", updates)}, part_bytes=part)
    found = {answer.client_id: answer for answer in remote.run(broadcast("a", "b", "c"), ["a", "b", "c"], timeout_s=9)}
    assert {name: answer.path.read_bytes()[:11] for name, answer in found.items()} == {
        name: f"update of {name}".encode() for name in "abc"
    }
    task = sites["y"].asked[0]["task"]
    assert task["seconds"] == 9
    assert {name: own["seeds"]["dropout"] for name, own in task["own"].items()} == {"b": [1], "c": [2]}
    assert "a" not in task["own"]  # a client's seeds are its own site's
    got = unpack(sites["y"].inbox.whole(task["bundle"]), tmp_path / "got")
    assert Broadcast.load(got[0]).round == 3
    assert courier.largest <= part


def test_clients_with_states_of_their_own_are_sent_their_own_alone(tmp_path):
    remote, sites, _ = reached(tmp_path, {"x": ("a", updates), "y": ("b", updates)})
    each = {name: Broadcast(3, {name: torch.ones(1)}) for name in "ab"}
    list(remote.run(broadcast("a", "b", each=each), ["a", "b"]))
    for site, client in (("x", "a"), ("y", "b")):
        task = sites[site].asked[0]["task"]
        (file,) = unpack(sites[site].inbox.whole(task["bundle"]), tmp_path / f"got_{site}")
        assert list(Broadcast.load(file).state) == [client]


@pytest.mark.parametrize(
    "said",
    [
        {}, {"a": {"dropped": "x"}, "b": {"dropped": "x"}}, {"a": {}}, {"a": "x"}, {"a": {"file": 3}}, [],
        {"a": {"file": "00007"}}, {"a": {"says": {}}}, {"a": {"dropped": 3}},
    ],
)  # fmt: skip
def test_an_answer_that_is_none_drops_the_sites_clients(said, tmp_path):
    def answer(site, head):
        site.sends(**{"00000": b"x"})
        return said

    remote, _, _ = reached(tmp_path, {"x": ("a", answer), "y": ("b", updates)})
    found = {answer.client_id: answer for answer in remote.run(broadcast("a", "b"), ["a", "b"])}
    assert isinstance(found["a"], Dropped)
    assert found["a"].reason.startswith("site 'x': ")
    assert isinstance(found["b"], UpdateFile)


def test_a_file_larger_than_the_terms_allow_is_not_fetched(tmp_path):
    def answer(site, head):
        site.sends(**{"00000": b"x" * 5000})
        return {"a": {"file": "00000"}}

    remote, _, courier = reached(tmp_path, {"x": ("a", answer)}, part_bytes=1000, most_bytes=4000)
    (found,) = remote.run(broadcast("a"), ["a"])
    assert "4000 are the most that is taken" in found.reason
    assert courier.bytes["pulled"] <= 1000


def test_states_to_score_travel_as_a_file_and_sums_come_back(tmp_path):
    remote, sites, _ = reached(
        tmp_path, {"x": ("a", lambda site, head: {"a": {"says": {"tuned": {"nll": [1.5, 30]}}}})}
    )
    (found,) = remote.ask({"a": EVALUATE})
    assert found == Sums("a", {"tuned": {"nll": (1.5, 30)}})
    question = sites["x"].asked[0]["question"]
    (file,) = unpack(sites["x"].inbox.whole(question["bundle"]), tmp_path / "got")
    assert Broadcast.load(file).extras["tuned"]["w"].tolist() == [0.0, 1.0, 2.0]


def test_a_client_that_two_sites_claim_is_refused_by_name(tmp_path):
    with pytest.raises(ClientError, match="sites 'x' and 'y' both have a client 'a'"):
        reached(tmp_path, {"x": ("a", updates), "y": ("ab", updates)})


def test_a_site_that_refuses_at_hello_ends_the_start_by_name(tmp_path):
    courier = FakeCourier(
        {"x": lambda head, payload: ({"error": "version", "why": "0.1 here"}, NOTHING)}, tmp_path / "l"
    )
    remote = RemoteSites(Link(lambda: courier, Terms(wait_s=1), tmp_path / "m"), "ab" * 16, ["x"], tmp_path / "m")
    with pytest.raises(ClientError, match=r"site 'x': it speaks another version: 0.1 here"):
        remote.greet()


def test_a_site_that_the_hub_does_not_know_is_named_with_the_nearest(tmp_path):
    (tmp_path / "hub/sites").mkdir(parents=True)
    for name in ("ward_a", "ward_b"):
        (tmp_path / f"hub/sites/{name}.json").write_text(json.dumps({"name": name}))
    engine = Flower(hub=str(tmp_path / "hub"), sites=["ward_a", "wardb"])
    with pytest.raises(
        ConfigError, match=r"engine.sites: the hub .* has registered no site 'wardb'; did you mean 'ward_b'"
    ):
        engine.clients()
    with pytest.raises(ConfigError, match="is no hub's folder"):
        Flower(hub=str(tmp_path / "nowhere")).clients()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="has registered no site"):
        Flower(hub=str(tmp_path / "empty")).clients()


@pytest.mark.parametrize("asks", ["run", "ask"])
def test_a_disk_of_the_servers_that_is_full_ends_the_round_in_one_line(asks, tmp_path, monkeypatch):
    def full(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    remote, _, _ = reached(tmp_path, {"x": ("a", updates)})
    monkeypatch.setattr("fedproxy.tensor_files.save_file", full)
    with pytest.raises(CheckpointError, match=r"now cannot be written \(No space left on device\); free disk space"):
        list(remote.run(broadcast("a"), ["a"]) if asks == "run" else remote.ask({"a": EVALUATE}))


MOVES = [
    *("recipe=fedproxy_tiny", "engine.name=flower", "data.partition.name=sites", "data.partition.clients=4"),
    *("aggregator.name=flora", "federation.space=product", "regularizer.name=none"),
]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["federation.clients_per_round=2"], r"federation.clients_per_round must be all at real sites .*=flora, got 2"),
        (["federation.min_clients=3"], r"federation.min_clients must be null at real sites with .*, got 3: it moves"),
        (["federation.clients_per_round=4", "federation.min_clients=4"], None),
        (["federation.clients_per_round=2", "aggregator.name=flexlora"], None),
    ],
)
def test_rounds_without_some_sites_are_refused_where_each_brings_a_change_of_the_frozen_weights(words, said):
    if said is None:
        check_components(load_config([*MOVES, *words]))
        return
    with pytest.raises(ConfigError, match=said):
        check_components(load_config([*MOVES, *words]))
