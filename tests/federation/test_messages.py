"""What the server asks clients beside training: who they are, and how states do on the rows that they hold back."""

from dataclasses import asdict, replace
from importlib.metadata import version

import pytest
import torch
from torch.nn.functional import log_softmax

from fedproxy.data.assets import resolve
from fedproxy.data.batching import IGNORED, collate
from fedproxy.data.partition.rows import ClientRows
from fedproxy.data.rows import Row
from fedproxy.errors import ClientError
from fedproxy.federation.client.setup import LocalSetup, load
from fedproxy.federation.engines import Engine
from fedproxy.federation.server.asking import greet, introduced, score
from fedproxy.federation.server.checkpoint import Progress
from fedproxy.federation.server.expected import Expected
from fedproxy.messages import Collect, Done, Dropped, Evaluate, Facts, Hello, Message, Rewind, Sums
from fedproxy.protocol import Broadcast, Kept

PROXY = "asset:tiny-llama"
LENGTHS = {"max_input_tokens": 32, "max_target_tokens": 24}


def rows(count, offset=0):
    return [
        Row("How much?\nAnswer:" * (1 + i % 2), f" {i + offset} and more" * (1 + i % 3), "made_up", f"made_up/{i}")
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clients")
    held_out = [replace(row, key=f"{row.key}/held_out", held_out=True) for row in rows(20, 7)]
    ClientRows({"ann": [*rows(5), *held_out], "bob": rows(1)}, folder / "rows")
    return LocalSetup(
        proxy=str(resolve(PROXY)),
        dtype="float32",
        trainable={"name": "lora", "r": 2},
        rows=str(folder / "rows"),
        store=str(folder / "kept"),
        trainer={"accelerator": "cpu", "devices": 1},
        **LENGTHS,
    )


@pytest.fixture(scope="module")
def site(setup):
    return load(device=None, **asdict(setup))


@pytest.fixture(scope="module")
def states(site):
    draw = torch.Generator().manual_seed(3)
    return {
        name: {key: scale * torch.randn(t.shape, generator=draw) for key, t in sorted(site.initial.items())}
        for name, scale in (("before", 0.0), ("after", 0.3))
    }


def test_both_engines_carry_the_same_facts_and_sums(setup, site, states, tmp_path):
    remote = setup.remote([])
    asked = {"ann": Evaluate(Kept(), states), "bob": Evaluate(Kept(), states)}
    found = {}
    for name, options in (("in_process", {"threads": 1}), ("workers", {"workers": 1})):
        sites = Engine.by_name(name)(**options).start(lambda: site, remote, tmp_path / name)
        try:
            sums = {answer.client_id: answer for answer in sites.ask(asked)}
            found[name] = greet(sites, ["ann", "bob"]), sums
        finally:
            sites.close()
    assert found["in_process"] == found["workers"]
    facts, sums = found["workers"]
    assert (facts["ann"].rows, facts["bob"].rows, facts["ann"].held_out, facts["bob"].held_out) == (5, 1, 20, 0)
    assert facts["ann"].target_tokens == max(example.target_length for example in site.examples["ann"])
    assert len(facts["ann"].proxy) == 64
    assert facts["ann"].versions["torch"] == version("torch")
    assert isinstance(sums["bob"], Dropped)
    assert sums["bob"].reason.startswith("the client holds no rows back to be evaluated on; set data.holdout")


def test_sums_are_those_of_the_plain_forward_pass(site, states):
    found = site.answer(Evaluate(Kept(), states), "ann").by_state
    site.model.load_state(states["after"])
    total, tokens, means = 0.0, 0, []
    for example in site.held_out["ann"]:
        batch = collate([example], 0)
        with torch.no_grad():
            logits = site.model.model(input_ids=batch["input_ids"]).logits[0, :-1].double()
        labels = batch["labels"][0, 1:]
        answer = labels != IGNORED
        nll = -log_softmax(logits[answer], -1)[range(int(answer.sum())), labels[answer]]
        total, tokens, means = total + float(nll.sum()), tokens + len(nll), [*means, float(nll.mean())]
    assert found["after"]["answer_nll"] == (pytest.approx(total, rel=1e-5), tokens)
    assert found["after"]["row_nll"] == (pytest.approx(sum(means), rel=1e-5), 20)
    assert found["before"]["answer_nll"][0] != found["after"]["answer_nll"][0]


def test_personal_tensors_complete_a_state(site, states):
    name = next(name for name in states["after"] if "lora_B" in name)
    shared = {key: tensor for key, tensor in states["after"].items() if key != name}
    seal = site.memory.save("ann", 1, {"personal": {name: states["after"][name]}})
    completed = site.answer(Evaluate(Kept(1, seal), {"it": shared}), "ann").by_state["it"]
    assert completed == site.answer(Evaluate(Kept(), {"it": states["after"]}), "ann").by_state["it"]
    assert completed != site.answer(Evaluate(Kept(), {"it": shared}), "ann").by_state["it"]
    handed = site.answer(Collect(Kept(1, seal)), "ann")
    assert torch.equal(handed.delta[name], states["after"][name])


class Saying:
    """Sites whose clients answer with given things."""

    def __init__(self, *answers):
        self.answers = answers

    def ask(self, messages):
        yield from self.answers


def facts(client, **change):
    return Facts(client, **{"rows": 5, "target_tokens": 9, "held_out": 2, "proxy": "", "versions": {}, **change})


def test_what_clients_say_fills_what_the_server_does_not_know():
    said = greet(Saying(facts("a"), facts("b", rows=7, target_tokens=3)), ["a", "b"])
    own = Expected(extras={"x": None})
    found = introduced(Expected(own={"a": own}), said)
    assert (found.rows, found.target_tokens) == ({"a": 5, "b": 7}, 9)
    assert (found.of("a").rows, found.of("a").extras) == (found.rows, own.extras)
    known = Expected(rows={"a": 1}, target_tokens=4)
    assert introduced(known, said) == known
    with pytest.raises(ClientError, match=r"^client 'b' does not say what it is: offline; mend that, .*resume=auto$"):
        greet(Saying(facts("a"), Dropped("b", "offline")), ["a", "b"])


def test_sums_of_clients_are_added_and_who_does_not_answer_is_named():
    sites = Saying(
        Sums("b", {"s": {"answer_nll": (6.0, 3)}}),
        Dropped("c", "off\nline"),
        Sums("a", {"s": {"answer_nll": (1.0, 2)}}),
    )
    found, dropped = score(sites, Progress(1, {}), {"s": {}}, ["a", "b", "c"])
    assert found == {"s": {"answer_nll": (7.0, 5)}}
    assert dropped == {"c": "off line"}


@pytest.mark.parametrize("message", [Hello(), Rewind(3, Kept(2, "ab" * 32), "cd" * 32), Collect(Kept())])
def test_messages_survive_the_trip(message):
    assert Message.of(message.plain()) == message


def test_states_travel_as_a_file(tmp_path, states):
    message = Evaluate(Kept(), states)
    Broadcast(0, {}, extras=message.tensors).save(tmp_path / "f")
    back = Message.of(message.plain(), Broadcast.load(tmp_path / "f").extras)
    assert list(back.states) == sorted(states)
    assert all(torch.equal(back.states[s][name], t) for s in states for name, t in states[s].items())


@pytest.mark.parametrize(
    "said",
    [
        None, [], "hello", {}, {"kind": "train"}, {"kind": "rewind", "round": 1},
        {"kind": "rewind", "round": "1", "kept": {"round": 0, "seal": ""}, "changes": ""},
        {"kind": "rewind", "round": 1, "kept": {"round": 0, "seal": ""}, "changes": "../x"},
        {"kind": "collect", "kept": {"round": -1, "seal": ""}}, {"kind": "collect", "kept": {"round": 1, "seal": "00"}},
        {"kind": "evaluate", "kept": {"round": 0, "seal": ""}},
    ],
)  # fmt: skip
def test_what_is_no_message_is_refused(said):
    with pytest.raises(ClientError, match=r"^the message (is none that|does not say).*; (use|send) "):
        Message.of(said)


GOOD = facts("a").plain()


@pytest.mark.parametrize(
    "said",
    [
        None, {}, {**GOOD, "rows": 0}, {**GOOD, "rows": True}, {**GOOD, "rows": 10**12}, {**GOOD, "held_out": -1},
        {**GOOD, "proxy": "x" * 64}, {**GOOD, "versions": {"torch": 2}}, {**GOOD, "versions": {"v" * 99: "1"}},
        {**GOOD, "versions": {str(i): "1" for i in range(99)}},
    ],
)  # fmt: skip
def test_what_is_no_fact_is_refused(said):
    with pytest.raises(ClientError, match=r"^what it says of itself is not rows, tokens, proxy and versions; use"):
        Hello().answered("a", said, None)
    assert Hello().answered("a", {**GOOD, "versions": {"torch": "2\x1b[31m"}}, None).versions == {"torch": "2"}
    assert Rewind(1, Kept()).answered("a", {"rows": "of a client"}, None) == Done("a")


@pytest.mark.parametrize(
    "said",
    [
        None, {}, {"other": {}}, {"s": {}}, {"s": 1}, {"s": {"m": 1.0}}, {"s": {"m": [1.0]}}, {"s": {"m": ["1", 1]}},
        {"s": {"m": [float("nan"), 1]}}, {"s": {"m": [10**400, 1]}}, {"s": {"m": [1.0, 0]}}, {"s": {"m": [1.0, True]}},
        {"s": {"m" * 99: [1.0, 1]}}, {"s": {f"a row, word {i}": [1.0, 1] for i in range(65)}},
    ],
)  # fmt: skip
def test_what_is_no_sum_is_refused(said):
    with pytest.raises(ClientError, match=r"^its sums (are not of the states|must (each )?be) .*; use the server's"):
        Evaluate(Kept(), {"s": {}}).answered("a", said, None)
    assert Evaluate(Kept(), {"s": {}}).answered("a", {"s": {"m": [2, 1]}}, None) == Sums("a", {"s": {"m": (2.0, 1)}})
