import math

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from fedproxy.errors import ClientError
from fedproxy.privacy import secure_sum
from fedproxy.privacy.keys import Identity, Occasion, verify
from fedproxy.privacy.one_time import OneTime
from fedproxy.privacy.registration import register_all, registered
from fedproxy.privacy.secure_sum import added, decode, encode, masked, step_of

NAMES = ("a", "b", "c", "d")
WHEN = Occasion("run", 3, 0)
IDENTITIES = {name: Identity(name, bytes([index]) * 32) for index, name in enumerate(NAMES, 1)}
REGISTERED = {name: identity.public for name, identity in IDENTITIES.items()}


OWN = {name: bytes([16 + index]) * 32 for index, name in enumerate(NAMES)}
"""What each client's share is made of."""


def shares(occasion=WHEN):
    return {name: identity.share(occasion, OWN[name]) for name, identity in IDENTITIES.items()}


def keys_of(name, occasion=WHEN):
    own = IDENTITIES[name]
    others = {other: share for other, share in shares(occasion).items() if other != name}
    return {other: own.secret_with(other, share, occasion, OWN[name]) for other, share in others.items()}


def updates(scale=0.01, count=4, size=20_000):
    generator = torch.Generator().manual_seed(5)
    return [
        {
            "b": scale * torch.randn(size // 100, 100, generator=generator),
            "a": scale * torch.randn((), generator=generator),
        }
        for _ in range(count)
    ]


def sent(values, occasion=WHEN, largest=1.0):
    encoded = [encode(value, largest, len(values)) for value in values]
    return [masked(value, name, keys_of(name, occasion)) for name, value in zip(NAMES, encoded, strict=False)]


def test_masks_cancel_in_the_sum_to_fixed_point_precision():
    values = updates()
    total = decode(added(sent(values)), 1.0, 4)
    for name in ("a", "b"):
        exact = sum(value[name].double() for value in values)
        error = float((total[name].double() - exact).abs().max())
        assert error <= 4 / 2 * step_of(1.0, 4) + 1e-9
        assert error <= 2e-6 * float(max(value[name].abs().max() for value in values))
        assert total[name].shape == values[0][name].shape


def test_the_largest_numbers_do_not_overflow():
    values = [{"w": torch.tensor([1.0, -1.0, 0.5])} for _ in NAMES]
    assert decode(added(sent(values)), 1.0, 4)["w"].tolist() == pytest.approx([4.0, -4.0, 2.0], abs=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.37])
def test_what_the_server_receives_is_uniform(value):
    """Equal numbers of one client, which in the clear are one pattern of bytes: all 256 bytes come alike often."""
    values = [{"w": torch.full((100_000,), value)} for _ in NAMES]
    for update in sent(values):
        seen = np.bincount(update["w"].numpy().view(np.uint8), minlength=256)
        assert chisquare(seen).pvalue > 1e-4
    clear = np.bincount(encode(values[0], 1.0, 4)["w"].numpy().view(np.uint8), minlength=256)
    assert chisquare(clear).pvalue < 1e-9  # the test sees what is not hidden


def test_all_but_one_update_say_nothing_of_the_sum():
    values = [{"w": torch.full((100_000,), 0.1)} for _ in NAMES]
    partial = added(sent(values)[:3])["w"].numpy().view(np.uint8)
    assert chisquare(np.bincount(partial, minlength=256)).pvalue > 1e-4


def test_masks_of_another_sum_are_others():
    values = updates()
    first, repeated = sent(values), sent(values, Occasion("run", 3, 1))
    for one, other in zip(first, repeated, strict=True):
        assert float((one["b"] == other["b"]).float().mean()) < 1e-3
    assert torch.equal(added(first)["b"], added(repeated)["b"])


def test_tensors_do_not_share_masks():
    """Two equal tensors whose length is no multiple of a block: no mask is used twice."""
    values = {"x": torch.zeros(1001, dtype=torch.int32), "y": torch.zeros(1001, dtype=torch.int32)}
    found = masked(values, "a", keys_of("a"))
    words = torch.cat([found["x"], found["y"]])
    assert len(torch.unique(words)) >= 2000


def test_a_sum_of_one_is_refused_and_so_is_a_number_too_large():
    with pytest.raises(ClientError, match=r"a secure sum of one client hides nothing"):
        masked({"w": torch.zeros(2, dtype=torch.int32)}, "a", {})
    for bad in (1.5, float("nan"), float("inf")):
        with pytest.raises(ClientError, match=r"tensor 'w' has a magnitude of .* takes at most 1; raise"):
            encode({"w": torch.tensor([0.0, bad])}, 1.0, 4)


def test_both_ends_of_a_pair_have_one_key_and_no_other_pair_has_it():
    pairs = {tuple(sorted((one, other))): key for one in NAMES for other, key in keys_of(one).items()}
    assert len(set(pairs.values())) == 6
    assert keys_of("a")["b"] == keys_of("b")["a"]


def test_signed_shares_pass_and_others_are_refused_by_name():
    verify(shares(), REGISTERED, WHEN)
    forged = Identity("b", b"\7" * 32).share(WHEN, OWN["b"])
    stolen = shares()["c"]
    for bad, said in (
        (forged, r"key share of client 'b' is not signed by its registered key .* forged"),
        (stolen, r"key share of client 'b' is not signed by its registered key"),
        (IDENTITIES["b"].share(Occasion("run", 2, 0), OWN["b"]), r"client 'b' .* an earlier one sent again"),
        (IDENTITIES["b"].share(Occasion("run", 3, 1), OWN["b"]), r"client 'b' .* an earlier one sent again"),
        (IDENTITIES["b"].share(Occasion("other", 3, 0), OWN["b"]), r"client 'b' .* an earlier one sent again"),
        (shares()["b"][:32], r"key share of client 'b' is unsigned: it has 32 bytes"),
        (shares()["a"][:32] + shares()["b"][32:], r"key share of client 'b' is not signed"),
    ):
        with pytest.raises(ClientError, match=said):
            verify({**shares(), "b": bad}, REGISTERED, WHEN)
    with pytest.raises(ClientError, match=r"client 'e' has no registered key"):
        verify({**shares(), "e": Identity("e", rb"\9" * 16).share(WHEN, OWN["a"])}, REGISTERED, WHEN)


def test_a_share_of_small_order_is_refused():
    with pytest.raises(ClientError, match=r"key share of client 'b' is not usable"):
        IDENTITIES["a"].secret_with("b", bytes(96), WHEN, OWN["a"])


def test_codes_and_masks_depend_neither_on_threads_nor_on_how_numbers_are_split(monkeypatch):
    numbers = {"a": torch.randn(1001, generator=torch.Generator().manual_seed(0)), "b": torch.randn(7, 3)}
    keys = {"p": bytes(32), "r": bytes([1]) * 32}
    made = []
    for threads, share, chunk in ((1, 1 << 22, 1 << 18), (3, 97, 16), (2, 64, 64)):
        monkeypatch.setattr(secure_sum, "_SHARE", share)
        monkeypatch.setattr(secure_sum, "_CHUNK", chunk)
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        made.append(masked(encode(numbers, 16.0, 3), "q", keys))
    assert all(torch.equal(made[0][name], other[name]) for other in made[1:] for name in numbers)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1.5, -1.5])
def test_a_number_too_large_is_found_wherever_it_stands(value, monkeypatch):
    monkeypatch.setattr(secure_sum, "_SHARE", 10)
    numbers = torch.zeros(100)
    numbers[57] = value
    with pytest.raises(ClientError, match=r"tensor 'w' has a magnitude of (nan|inf|1.5), and a secure sum takes"):
        encode({"w": numbers}, 1.0, 2)


def test_every_share_is_of_a_new_secret(tmp_path):
    register_all(tmp_path, ["a", "b"])
    one, other = OneTime(tmp_path, "a").share(WHEN), OneTime(tmp_path, "a").share(WHEN)
    assert one[:32] != other[:32]
    for share in (one, other):
        verify({"a": share}, registered(tmp_path), WHEN)
    with pytest.raises(ClientError, match=r"key share of client 'a' is not the last one that it sent"):
        OneTime(tmp_path, "a").secret_for(WHEN, one, "values")


def test_a_share_masks_one_set_of_values(tmp_path):
    register_all(tmp_path, ["a"])
    share = OneTime(tmp_path, "a").share(WHEN)
    own = OneTime(tmp_path, "a").secret_for(WHEN, share, "values")
    assert OneTime(tmp_path, "a").secret_for(WHEN, share, "values") == own  # an answer that was lost
    with pytest.raises(ClientError, match=r"client 'a' has masked other values with this key share"):
        OneTime(tmp_path, "a").secret_for(WHEN, share, "other values")
    OneTime(tmp_path, "a").share(Occasion("run", 3, 1))
    OneTime(tmp_path, "a").share(Occasion("other run", 3, 0))
    with pytest.raises(ClientError, match=r"not the last one"):
        OneTime(tmp_path, "a").secret_for(WHEN, share, "values")


def test_few_secrets_are_kept(tmp_path):
    register_all(tmp_path, ["a"])
    made = {run: OneTime(tmp_path, "a").share(Occasion(run, 1, 0)) for run in map(str, range(20))}
    OneTime(tmp_path, "a").secret_for(Occasion("4", 1, 0), made["4"], "values")
    with pytest.raises(ClientError, match=r"not the last one"):
        OneTime(tmp_path, "a").secret_for(Occasion("3", 1, 0), made["3"], "values")
