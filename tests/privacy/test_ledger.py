import json
import multiprocessing
import stat

import pytest

from fedproxy.errors import CheckpointError, ClientError
from fedproxy.privacy.accounting import Release, spent
from fedproxy.privacy.ledger import Ledger, Terms
from fedproxy.sealed import write_sealed

DELTA = 1e-5


def terms(**changes):
    options = {"run": "one", "unit": "client", "epsilon": 8.0, "delta": DELTA, "accountant": "rdp"}
    return Terms(**{**options, "planned": Release(0.0), "rounds": 4, **changes})


def test_a_plan_is_spent_to_its_budget_and_not_beyond(tmp_path):
    ledger = Ledger(tmp_path / "ledger", "a")
    charges = [ledger.charge(terms(), number, f"key {number}") for number in range(1, 5)]
    noise = {charge.release.noise_multiplier for charge in charges}
    assert len(noise) == 1  # one noise for the whole run
    assert [charge.releases for charge in charges] == [1, 2, 3, 4]
    assert charges[-1].epsilon == spent([Release(noise.pop(), steps=4)], DELTA, "rdp")
    assert 7.98 < charges[-1].epsilon <= 8.0
    assert charges[0].epsilon < charges[1].epsilon < charges[2].epsilon
    with pytest.raises(ClientError, match=r"privacy.epsilon=8 would be exceeded: .* holds 8 .* raise privacy.epsilon"):
        ledger.charge(terms(), 5, "key 5")
    assert len(entries(ledger)) == 4  # what was refused is not charged


def entries(ledger):
    return json.loads(ledger.path.read_text())["entries"]


def test_until_there_is_a_release_the_same_request_gets_another_try_under_its_charge_and_key(tmp_path):
    first = Ledger(tmp_path, "a").charge(terms(), 1, "key")
    again = Ledger(tmp_path, "a").charge(terms(), 1, "key")
    assert again == first
    assert len(first.key) == 32
    assert first.made == ""


def test_no_two_releases_share_a_key_and_each_is_charged(tmp_path):
    ledger = Ledger(tmp_path, "a")
    first = ledger.charge(terms(), 1, "key")
    other = ledger.charge(terms(), 1, "other state")
    assert ledger.made(first.number, "seal") == "seal"
    known = ledger.charge(terms(), 1, "key")
    assert (known.number, known.made, known.key, known.releases) == (first.number, "seal", b"", 2)
    anew = ledger.charge(terms(), 1, "key", anew=True)  # the release's file is damaged
    assert (anew.number, anew.made, anew.releases) == (2, "", 3)
    assert len({first.key, other.key, anew.key}) == 3
    assert ledger.charge(terms(), 1, "key") == anew


def test_the_key_is_forgotten_with_the_release_and_the_first_release_stays(tmp_path):
    ledger = Ledger(tmp_path, "a")
    charge = ledger.charge(terms(), 1, "key")
    assert charge.key.hex() in ledger.path.read_text()
    ledger.made(charge.number, "one")
    assert charge.key.hex() not in ledger.path.read_text()
    assert ledger.made(charge.number, "two") == "one"  # of two processes at once


def test_releases_that_may_be_asked_for_again_are_few(tmp_path):
    ledger = Ledger(tmp_path, "a")
    for number in range(1, 5):
        ledger.charge(terms(planned=Release(50.0), rounds=8), number, f"key {number}")
        ledger.charge(terms(run="two", planned=Release(50.0), rounds=8), number, f"two {number}")
    assert ledger.needed("one", 4) == {4, 6, 7}  # rounds 3 and 4, and the other run's latest
    for run in ("three", "four"):
        ledger.charge(terms(run=run, planned=Release(50.0), rounds=8), 1, run)
    assert ledger.needed("one", 4) == {4, 6, 8, 9}  # of the other runs the last two


def test_a_second_run_on_the_same_rows_gets_what_is_left(tmp_path):
    ledger = Ledger(tmp_path, "a")
    first = ledger.charge(terms(epsilon=4.0, rounds=1), 1, "key")
    with pytest.raises(ClientError, match=r"privacy.epsilon must be above the 4 that was spent .* got 3; raise"):
        ledger.charge(terms(run="two", epsilon=3.0), 1, "two 1")
    later = ledger.charge(terms(run="two", epsilon=8.0, rounds=1), 1, "two 1")
    assert later.epsilon == spent([first.release, later.release], DELTA, "rdp")
    assert 7.98 < later.epsilon <= 8.0
    with pytest.raises(ClientError, match=r"would be exceeded: .* with the 4 planned rounds it would be"):
        ledger.charge(terms(run="three", planned=Release(3.0)), 1, "three 1")


def test_rows_dealt_out_anew_count_what_their_earlier_owners_spent(tmp_path):
    for client, noise in (("a", 3.0), ("b", 2.0)):
        Ledger(tmp_path, client).charge(terms(planned=Release(noise), rounds=1), 1, client)
    charge = Ledger(tmp_path, "c").charge(terms(run="two", planned=Release(4.0), rounds=1), 1, "c")
    assert charge.epsilon == spent([Release(2.0), Release(4.0)], DELTA, "rdp")  # b spent more than a
    same_run = Ledger(tmp_path, "d").charge(terms(planned=Release(4.0), rounds=1), 1, "d")
    assert same_run.epsilon == spent([Release(4.0), Release(4.0)], DELTA, "rdp")  # of run two alone


def test_a_row_that_changed_hands_counts_its_earlier_owner_even_where_the_new_one_took_part(tmp_path):
    """In run one a row was b's, who spent more than a; in run two it is a's."""
    for client, noise in (("a", 3.0), ("b", 2.0)):
        Ledger(tmp_path, client).charge(terms(planned=Release(noise), rounds=1), 1, client)
    charge = Ledger(tmp_path, "a").charge(terms(run="two", planned=Release(4.0), rounds=1), 1, "a again")
    assert charge.epsilon == spent([Release(2.0), Release(4.0)], DELTA, "rdp")


def test_what_other_runs_spend_in_the_meantime_counts(tmp_path):
    mine = terms(run="two", planned=Release(4.0))
    Ledger(tmp_path, "a").charge(mine, 1, "a 1")
    Ledger(tmp_path, "b").charge(terms(planned=Release(2.0), rounds=1), 1, "b")
    charge = Ledger(tmp_path, "a").charge(mine, 2, "a 2")
    assert charge.epsilon == spent([Release(4.0, steps=2), Release(2.0)], DELTA, "rdp")


def test_a_ledger_of_the_first_format_counts_and_none_of_its_noise_is_drawn_again(tmp_path):
    ledger = Ledger(tmp_path, "a")
    entry = {"run": "one", "round": 1, "key": "key", "release": Release(4.0).plain()}
    old = {"format": "fedproxy-ledger-1", "client": "a", "secret": "00" * 32, "unit": "client"}
    write_sealed(ledger.path, {**old, "entries": [entry], "runs": {}, "others": {"one": []}})
    charge = ledger.charge(terms(planned=Release(4.0)), 1, "key")
    assert charge.releases == 2
    assert charge.epsilon == spent([Release(4.0, steps=2)], DELTA, "rdp")


def test_a_run_that_goes_on_may_not_lower_its_noise(tmp_path):
    ledger = Ledger(tmp_path, "a")
    ledger.charge(terms(planned=Release(4.0)), 1, "key 1")
    with pytest.raises(ClientError, match=r"privacy.noise_multiplier must be at least 4, .* got 3; a run that goes on"):
        ledger.charge(terms(planned=Release(3.0)), 2, "key 2")
    assert ledger.charge(terms(planned=Release(5.0)), 2, "key 2").release.noise_multiplier == 5.0


def test_units_do_not_mix(tmp_path):
    Ledger(tmp_path, "a").charge(terms(planned=Release(4.0)), 1, "key")
    with pytest.raises(ClientError, match=r"privacy.unit must be client as in the earlier releases .* got example"):
        Ledger(tmp_path, "a").charge(terms(run="two", unit="example", planned=Release(4.0)), 1, "other")
    with pytest.raises(ClientError, match=r"privacy.unit must be client as in the earlier releases of .*/a-.*json, g"):
        Ledger(tmp_path, "b").charge(terms(run="two", unit="example", planned=Release(4.0)), 1, "rows that were a's")
    assert not Ledger(tmp_path, "b").path.exists()


def test_a_ledger_that_was_taken_away_is_missed(tmp_path):
    ledger = Ledger(tmp_path, "a")
    charge = ledger.charge(terms(), 1, "key 1")
    ledger.path.unlink()
    with pytest.raises(ClientError, match=r"holds 0 releases of client 'a', which has made 1; put back a copy"):
        ledger.charge(terms(), 2, "key 2", known=charge.releases)


def test_a_damaged_ledger_is_refused_and_a_whole_one_is_private(tmp_path):
    ledger = Ledger(tmp_path, "a")
    ledger.charge(terms(), 1, "key 1")
    assert stat.S_IMODE(ledger.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700
    content = json.loads(ledger.path.read_text())
    content["entries"] = []
    ledger.path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"is damaged: .* put back a copy of it: without it nobody knows"):
        ledger.charge(terms(), 2, "key 2")
    write_sealed(ledger.path, {"format": "fedproxy-ledger-9"})
    with pytest.raises(CheckpointError, match=r"is not a ledger of format fedproxy-ledger-2"):
        ledger.charge(terms(), 2, "key 2")


def _charge(folder, number):
    Ledger(folder, "a").charge(terms(planned=Release(50.0), rounds=8), number, str(number))


def test_processes_at_once_are_all_counted(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_charge, args=(tmp_path, number)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(entries(Ledger(tmp_path, "a"))) == 4


def test_without_noise_there_is_no_epsilon(tmp_path):
    free = terms(epsilon=None, delta=None, planned=Release(0.0))
    assert Ledger(tmp_path, "a").charge(free, 1, "key").epsilon == float("inf")
