"""Who is in a round's result: the same terms whatever the engine, every dropped client with its reason."""

import re
from dataclasses import dataclass, replace

import pytest
import torch

from fedproxy.errors import CheckpointError, ClientError
from fedproxy.federation.engines import Engine, RemoteClient
from fedproxy.federation.server.expected import Expected, Group
from fedproxy.federation.server.participation import Participation
from fedproxy.messages import Dropped

from .engines.doubles import CLIENTS, STATE, Double, broadcast, honest, remote


def collect(folder, words, *, round_=2, engine=None, **terms):
    """Run one round of the doubles, each client obeying its word, and return (ids of updates, dropped, said)."""
    for client, word in words.items():
        (folder / client).write_text(word)
    running = (engine or Engine.by_name("in_process")()).start(lambda: Double(str(folder)), remote(folder), folder)
    said = []
    updates, dropped = Participation(**terms).collect(
        running, broadcast(round_), CLIENTS, lambda number, answer: said.append((number, answer))
    )
    running.close()
    return [update.client_id for update in updates], dropped, said


FAULTS = [
    ("raise", r"RuntimeError; no log is kept"),
    ("nan", r"tensor 'b' must be finite, got NaN or infinity"),
    ("inf", r"tensor 'b' must be finite, got NaN or infinity"),
    ("key", r"lacks tensor 'b'"),
    ("shape", r"tensor 'b' must be float32 \(4,\), got float32 \(3,\)"),
    ("dtype", r"tensor 'b' must be float32 \(4,\), got float64 \(4,\)"),
    ("replay", r"answers round 1, not 2"),
    ("round 2.0", r"answers round 2.0, not 2"),
    ("counts", r"num_examples must be a whole number from 1 to 1000000000, got -5"),
    ("weighs 1e12", r"num_examples must be a whole number from 1 to 1000000000, got 1000000000000"),
    ("weighs 1e400", r"num_examples must be a whole number from 1 to 1000000000, got 10{56}\.\.\."),
    ("trained 1e12", r"num_tokens must be a whole number from 0 to 1000000000, got 1000000000000"),
    ("loss 1e400", r"train_loss must be a number from -1e\+09 to 1e\+09, got 10{56}\.\.\."),
    ("loss nan", r"train_loss must be a number from -1e\+09 to 1e\+09, got nan"),
    ("loss true", r"train_loss must be a number from -1e\+09 to 1e\+09, got True"),
    ("term inf", r"regularizer_loss must be a number from -1e\+09 to 1e\+09, got inf"),
    ("seconds 1e400", r"seconds must be a number from 0 to 1e\+08, got 10{56}\.\.\."),
    ("seconds none", r"seconds must be a number from 0 to 1e\+08, got None"),
    ("seconds -1", r"seconds must be a number from 0 to 1e\+08, got -1.0"),
    ("unasked", r"has unknown extras 'fisher'; send exactly the extras that the round asks for"),
    ("name", r"in the name of client 'dot'"),
    # bob moves each of 10 coordinates by 8e3, the others by 2, 6 and 8: lower median 6 sqrt(10), ratio 8e3 / 6
    ("huge", r"norm 2.53e\+04 is 1.33e\+03 times the round's median 19, federation.max_norm_ratio allows 1000"),
    ("3e38", r"tensor 'a' must lie within 10000, got a magnitude of 3e\+38; lower client.lr"),
]


@pytest.mark.parametrize(("word", "reason"), FAULTS)
def test_a_fault_drops_the_client_and_keeps_the_others(tmp_path, word, reason):
    ids, dropped, said = collect(tmp_path, {"bob": word}, min_clients=3)
    assert ids == ["ann", "cid", "dot"]
    assert list(dropped) == ["bob"]
    assert re.search(reason, dropped["bob"])
    assert "\n" not in dropped["bob"]
    assert (2, Dropped("bob", dropped["bob"])) in said
    with pytest.raises(ClientError, match=f"^client 'bob' failed in round 2: .*{reason}.*; that leaves 3 of 4 clients"):
        collect(tmp_path, {"bob": word})


def test_the_error_below_min_clients_names_everyone_and_the_way_out(tmp_path):
    message = (
        r"^client 'cid' failed in round 2: .*; that leaves 2 of 4 clients \(dropped before it: bob\), and "
        r"federation.min_clients asks for 3; fix the client or lower federation.min_clients, then resume=auto$"
    )
    with pytest.raises(ClientError, match=message):
        collect(tmp_path, {"bob": "raise", "cid": "nan"}, min_clients=3)


def test_nobody_else_is_trained_once_the_round_is_lost(tmp_path):
    with pytest.raises(ClientError, match="client 'bob' failed"):
        collect(tmp_path, {"bob": "raise"})
    assert sorted(path.stem for path in tmp_path.glob("*.seen")) == ["ann", "bob"]


def test_late_clients_are_dropped_in_process_too(tmp_path):
    # every client takes .3 s, so the first ends in time and the second is under way when .45 s are over
    ids, dropped, _ = collect(tmp_path, dict.fromkeys(CLIENTS, "slow"), min_clients=1, round_timeout_s=0.45)
    assert ids == ["ann"]
    assert set(dropped) == {"bob", "cid", "dot"}
    assert set(dropped.values()) == {"late: no update within federation.round_timeout_s of 0.45 s"}


def test_no_length_is_checked_where_the_option_is_null(tmp_path):
    ids, dropped, _ = collect(tmp_path, {"bob": "huge"}, max_norm_ratio=None)
    assert (ids, dropped) == (list(CLIENTS), {})


def test_a_time_limit_that_cannot_stop_a_hanging_client_is_said_once(tmp_path, caplog):
    engine = Engine.by_name("in_process")()
    running = engine.start(lambda: Double(str(tmp_path)), remote(tmp_path), tmp_path)
    list(running.run(broadcast(), CLIENTS))
    assert not caplog.messages
    for _ in range(2):
        list(running.run(broadcast(), CLIENTS, timeout_s=60.0))
    (line,) = caplog.messages
    assert line.startswith("federation.round_timeout_s: engine.name=in_process looks at the time after each batch only")
    assert line.endswith("engine.name=workers stops it")


@dataclass
class Given:
    """An engine that answers with given updates."""

    answers: list

    def run(self, broadcast, client_ids, *, timeout_s=None):
        yield from self.answers

    def close(self):
        pass


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_examples": 3}, r"num_examples must be the 2 that it was dealt, got 3"),
        ({"num_examples": 1}, r"num_examples must be the 2 that it was dealt, got 1"),
        # 2 rows, 3 epochs, 1 to 5 answer tokens each
        ({"num_tokens": 5}, r"num_tokens must be a whole number from 6 to 30, got 5"),
        ({"num_tokens": 31}, r"num_tokens must be a whole number from 6 to 30, got 31"),
    ],
)
def test_a_client_weighs_what_it_was_dealt(change, reason):
    asked = replace(broadcast(), job={"epochs": 3})
    good = [replace(honest(client), num_tokens=30) for client in ("ann", "bob")]
    terms = Participation(1, expected=Expected(rows={"ann": 2, "bob": 2}, target_tokens=5))
    assert terms.collect(Given(good), asked, ["ann", "bob"]) == (good, {})
    updates, dropped = terms.collect(Given([good[0], replace(good[1], **change)]), asked, ["ann", "bob"])
    assert updates == good[:1]
    assert re.fullmatch(f"the update's {reason}", dropped["bob"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_examples": 10**9}, r"num_examples must be withheld \(1\), got 1000000000"),
        ({"num_examples": True}, r"num_examples must be withheld \(1\), got True"),
        ({"num_tokens": 7}, r"num_tokens must be withheld \(0\), got 7"),
        ({"train_loss": 1.5}, r"train_loss must be withheld \(None\), got 1.5"),
        ({"regularizer_loss": 0.0}, r"regularizer_loss must be withheld \(None\), got 0.0"),
    ],
)
def test_where_figures_are_withheld_all_count_alike(change, reason):
    told = {"num_examples": 1, "num_tokens": 0, "train_loss": None, "regularizer_loss": None}
    good = [replace(honest(client), **told) for client in ("ann", "bob")]
    terms = Participation(1, expected=Expected(withheld=True))
    assert terms.collect(Given(good), broadcast(), ["ann", "bob"]) == (good, {})
    _, dropped = terms.collect(Given([good[0], replace(good[1], **change)]), broadcast(), ["ann", "bob"])
    assert re.fullmatch(f"the update's {reason}", dropped["bob"])


def test_what_is_sent_in_the_clear_beside_a_masked_update_is_checked():
    clear, masked = (Group({"a": torch.zeros(2, device="meta")}, masked=masked) for masked in (False, True))
    terms = Participation(1, expected=Expected(extras={"privacy": clear, "weight": masked}, masked=True))
    values = {"privacy": {"a": torch.ones(2)}, "weight": {"a": torch.full((2,), float("nan"))}}
    good = [replace(honest(client), extras=values) for client in ("ann", "bob")]
    assert terms.collect(Given(good), broadcast(), ["ann", "bob"]) == (good, {})
    bad = replace(good[1], extras={**values, "privacy": {"a": torch.tensor([1.0, float("nan")])}})
    _, dropped = terms.collect(Given([good[0], bad]), broadcast(), ["ann", "bob"])
    assert "extras['privacy'] tensor 'a' must be finite" in dropped["bob"]


SQUARES = Expected(
    extras={
        "scaffold": Group({"a": torch.zeros(2, device="meta")}),
        "fisher": Group({"a": torch.zeros(2, device="meta")}, squares=True, non_negative=True),
    }
)


def with_extras(client, **extras):
    """An honest update whose extras are lists of numbers; by default [1, 0] times the client's step."""
    step = CLIENTS.index(client) + 1.0
    groups = {"scaffold": [step, 0.0], "fisher": [step, 0.0], **extras}
    tensors = {group: {"a": torch.tensor(value)} for group, value in groups.items() if isinstance(value, list)}
    kept = {group: value for group, value in groups.items() if isinstance(value, dict)}
    return replace(honest(client), extras={**tensors, **kept})


@pytest.mark.parametrize(
    ("extras", "reason"),
    [
        ({"scaffold": None}, r"lacks extras 'scaffold'; send exactly the extras that the round asks for"),
        ({"scaffold": {}}, r"lacks extras\['scaffold'\] tensor 'a'"),
        ({"fisher": {"b": torch.ones(2)}}, r"lacks extras\['fisher'\] tensor 'a'"),
        ({"scaffold": {"a": torch.ones(2), "b": torch.ones(2)}}, r"has unknown extras\['scaffold'\] tensor 'b'"),
        ({"scaffold": [1.0]}, r"extras\['scaffold'\] tensor 'a' must be float32 \(2,\), got float32 \(1,\)"),
        ({"fisher": {"a": torch.ones(2).double()}}, r"must be float32 \(2,\), got float64 \(2,\)"),
        ({"scaffold": [1.0, float("nan")]}, r"extras\['scaffold'\] tensor 'a' must be finite"),
        ({"fisher": [1.0, -2.0]}, r"extras\['fisher'\] tensor 'a' must be non-negative, got -2"),
        # lower median of 1, 3, 4 and bob's is 3; of Fisher information square roots are compared: 3e3 / sqrt(3)
        ({"scaffold": [0.0, 9e3]}, r"norm of extras\['scaffold'\] 9e\+03 is 3e\+03 times the round's median 3, "),
        ({"fisher": [9e6, 0.0]}, r"norm of extras\['fisher'\] 3e\+03 is 1.73e\+03 times the round's median 1.73, "),
    ],
)
def test_extras_are_those_that_the_round_asks_for(extras, reason):
    terms = Participation(3, expected=SQUARES)
    sent = [with_extras(client, **(extras if client == "bob" else {})) for client in CLIENTS]
    updates, dropped = terms.collect(Given(sent), broadcast(), CLIENTS)
    assert [update.client_id for update in updates] == ["ann", "cid", "dot"]
    assert list(dropped) == ["bob"]
    assert re.search(reason, dropped["bob"])


def test_squares_may_differ_by_the_square_of_the_ratio():
    sent = [with_extras(client, fisher=[9e5, 0.0] if client == "bob" else [1.0, 0.0]) for client in CLIENTS]
    assert len(Participation(expected=SQUARES).collect(Given(sent), broadcast(), CLIENTS)[0]) == 4


def test_what_nobody_thought_of_drops_the_client_too():
    sent = [honest("ann"), replace(honest("bob"), delta={"a": None, "b": None})]
    updates, dropped = Participation(1).collect(Given(sent), broadcast(), ["ann", "bob"])
    assert updates == sent[:1]
    assert dropped["bob"].startswith("its update cannot be read: AttributeError: 'NoneType' object has no attribute")


def loud(client, value):
    return replace(honest(client), delta={name: torch.full_like(tensor, value) for name, tensor in STATE.items()})


@pytest.mark.parametrize("value", [3e38, -3e38, 1e5])
def test_a_bound_needs_no_peers(value):
    asked = ["ann", "bob", "cid", "dot"]
    good = [loud("ann", 0.0), loud("bob", 0.0), honest("cid")]
    updates, dropped = Participation(1).collect(Given([*good, loud("dot", value)]), broadcast(), asked)
    assert updates == good
    assert re.search(r"tensor 'a' must lie within 10000, got a magnitude of ", dropped["dot"])
    with pytest.raises(ClientError, match=r"^client 'dot' failed in round 1: tensor 'a' must lie within 10000, "):
        Participation(max_norm_ratio=None).collect(Given([loud("dot", value)]), broadcast(), ["dot"])


def test_who_stood_still_is_no_median():
    sent = [loud("ann", 0.0), loud("bob", 0.0), loud("cid", 1.0), loud("dot", 2e3)]
    updates, dropped = Participation(1).collect(Given(sent), broadcast(), CLIENTS)
    assert [update.client_id for update in updates] == ["ann", "bob", "cid"]
    assert dropped["dot"].endswith("is 2e+03 times the round's median 3.16, federation.max_norm_ratio allows 1000")


def test_when_all_fail_alike_the_state_is_looked_at_first():
    sent = [loud(client, 3e38) for client in CLIENTS]
    with pytest.raises(
        ClientError, match=r"all 4 clients of round 1 failed alike.* magnitude of 3e\+38; lower client.lr or change the"
    ):
        Participation(1).collect(Given(sent), broadcast(), CLIENTS)


def test_a_reason_of_any_origin_is_one_short_printable_line():
    said = []
    sent = [honest("ann"), Dropped("bob", "\x1b[31mout\nof\u202e memory " + "x" * 20_000_000)]
    _, dropped = Participation(1).collect(
        Given(sent), broadcast(), ["ann", "bob"], lambda _, answer: said.append(answer)
    )
    assert dropped["bob"].startswith("out of memory xxx")
    assert len(dropped["bob"]) == 300
    assert said[1] == Dropped("bob", dropped["bob"])


def test_zero_updates_have_no_median_to_compare_with(tmp_path):
    ann = honest("ann")
    zero = replace(ann, delta={name: torch.zeros_like(tensor) for name, tensor in ann.delta.items()})
    updates, dropped = Participation().collect(Given([zero, honest("bob")]), broadcast(), ["ann", "bob"])
    assert len(updates) == 2
    assert not dropped


def alike(*reasons, min_clients=None):
    answers = [Dropped(client, reason) for client, reason in zip(CLIENTS, reasons, strict=False)]
    return Participation(min_clients).collect(Given(answers), broadcast(), CLIENTS)


def test_where_all_clients_fail_alike_none_of_them_is_to_blame():
    match = (
        r"^all 4 clients of round 1 failed alike, so that the state they were sent, .* no client: loss of ann is nan 1;"
    )
    for least in (None, 1):
        with pytest.raises(ClientError, match=match):
            alike(*(f"loss of {client} is nan {i}" for i, client in enumerate(CLIENTS, 1)), min_clients=least)
    with pytest.raises(ClientError, match="client 'cid' failed in round 1: out of memory"):
        alike("it raised", "it raised", "out of memory", "it raised")
    with pytest.raises(ClientError, match="client 'ann' failed in round 1: late: no update"):
        alike(*["late: no update within federation.round_timeout_s of 1 s"] * 4)


def test_one_client_that_fails_is_named_once_another_one_succeeds():
    answers = [Dropped("ann", "it raised"), honest("bob"), honest("cid")]
    taken = []
    with pytest.raises(ClientError, match=r"^client 'ann' failed in round 1: it raised; that leaves 3 of 4"):
        Participation().collect(Given(answers), broadcast(), CLIENTS, lambda number, answer: taken.append(answer))
    assert len(taken) == 2  # nobody else is waited for


@dataclass
class Damaged:
    """A client that finds a file of the run damaged."""

    def train(self, broadcast, client_id, *, deadline=None):
        raise CheckpointError("checkpoints/clients/ann/round_0001.safetensors cannot be used: it is cut")


def damaged_client(device=None):
    return Damaged()


@pytest.mark.parametrize("engine", ["in_process", "workers"])
def test_a_damaged_file_of_the_run_is_no_clients_fault(tmp_path, engine):
    far = RemoteClient(f"{__name__}:damaged_client")
    running = Engine.by_name(engine)().start(Damaged, far, tmp_path)
    try:
        with pytest.raises(CheckpointError, match=r"^checkpoints/clients/ann/round_0001.* cannot be used: it is cut$"):
            Participation(1).collect(running, broadcast(), CLIENTS)
    finally:
        running.close()
