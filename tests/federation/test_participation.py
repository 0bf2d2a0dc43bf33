"""Who is in a round's result: the same terms whatever the engine, every dropped client with its reason."""

import re
from dataclasses import dataclass, replace

import pytest
import torch

from fedproxy.errors import ClientError
from fedproxy.federation.engines import Dropped, Engine
from fedproxy.federation.participation import Participation

from .engines.doubles import CLIENTS, Double, broadcast, honest, remote


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
    ("raise", r"RuntimeError: out of memory"),
    ("nan", r"tensor 'b' must be finite, got NaN or infinity"),
    ("inf", r"tensor 'b' must be finite, got NaN or infinity"),
    ("key", r"lacks tensor 'b'"),
    ("shape", r"tensor 'b' must be float32 \(4,\), got float32 \(3,\)"),
    ("dtype", r"tensor 'b' must be float32 \(4,\), got float64 \(4,\)"),
    ("replay", r"answers round 1, not 2"),
    ("counts", r"num_examples must be a whole number of at least 1, got -5"),
    ("name", r"in the name of client 'dot'"),
    # bob moves each of 10 coordinates by 4e6, the others by 2, 6 and 8: lower median 6 sqrt(10), ratio 4e6 / 6
    ("huge", r"norm 1.26e\+07 is 6.67e\+05 times the round's median 19, federation.max_norm_ratio allows 1000"),
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
        r"federation.min_clients asks for 3; mend the client or lower federation.min_clients, then resume=auto$"
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


def test_zero_updates_have_no_median_to_compare_with(tmp_path):
    ann = honest("ann")
    zero = replace(ann, delta={name: torch.zeros_like(tensor) for name, tensor in ann.delta.items()})
    updates, dropped = Participation().collect(Given([zero, honest("bob")]), broadcast(), ["ann", "bob"])
    assert len(updates) == 2
    assert not dropped
