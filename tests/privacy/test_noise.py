import math
import os

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest

from fedproxy.privacy.noise import SecretStream, Stream, derived_key, noised

SECRET = bytes(range(32))


def test_key_stream_is_chacha20s():
    """RFC 8439, Appendix A.1, test vector 1: all-zero key and nonce, block counter 0."""
    stream = Stream(bytes(32))
    assert (bytes(stream.next(10)) + bytes(stream.next(54))).hex() == (
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
    )


@pytest.mark.parametrize("start", [1, 64, 100, 4 * (1 << 22) + 12])
def test_a_stream_can_begin_anywhere(start):
    whole = Stream(SECRET, 3)
    whole.next(start)
    assert bytes(Stream(SECRET, 3, start).next(200)) == bytes(whole.next(200))
    assert bytes(Stream(SECRET, 3).next(200)) != bytes(Stream(SECRET, 2).next(200))


def test_draws_are_normal_and_new_each_time():
    stream = SecretStream(SECRET, "a")
    first, second = stream.normal(50_001), stream.normal(50_001)
    assert first.shape == (50_001,)
    for draw in (first, second):
        assert kstest(draw.numpy(), "norm").pvalue > 1e-4
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 4 / math.sqrt(50_001)
    assert torch.equal(SecretStream(SECRET, "a").normal(50_001), first)  # the same secret and purpose: the same bits
    for other in (SecretStream(SECRET, "b"), SecretStream(bytes(32), "a")):
        assert not torch.equal(other.normal(50_001), first)


def test_large_draws_are_the_same_law(monkeypatch):
    monkeypatch.setattr("fedproxy.privacy.noise._PAIRS", 100)
    draw = SecretStream(SECRET, "a").normal(20_000)
    assert len(draw) == 20_000
    assert kstest(draw.numpy(), "norm").pvalue > 1e-4


def test_purposes_are_told_apart_by_their_bounds():
    assert derived_key(SECRET, "ab", "c") != derived_key(SECRET, "a", "bc")


@pytest.mark.parametrize("scale", [1e-3, 1.0, 250.0])
def test_noise_has_its_scale_and_stays_on_a_grid(scale):
    value = {"w": torch.full((300, 100), 0.25 * scale), "b": torch.zeros((), dtype=torch.float32)}
    found = noised(value, scale, SecretStream(os.urandom(32), "x"))
    assert {name: tensor.shape for name, tensor in found.items()} == {"w": (300, 100), "b": ()}
    noise = (found["w"] - value["w"]).double() / scale
    # Four standard errors of mean and deviation over 30,000 draws.
    assert abs(float(noise.mean())) < 4 / math.sqrt(30_000)
    assert float(noise.std()) == pytest.approx(1, abs=4 / math.sqrt(60_000))
    grid = 2.0 ** (math.floor(math.log2(scale)) - 20)
    steps = found["w"].double() / grid
    assert torch.equal(steps, steps.round())


def test_no_noise_keeps_every_bit():
    value = {"w": torch.randn(5, generator=torch.Generator().manual_seed(0))}
    assert torch.equal(noised(value, 0.0, SecretStream(SECRET, "x"))["w"], value["w"])


def test_samples_are_fair():
    stream = SecretStream(SECRET, "a")
    counts = np.zeros(50)
    for _ in range(2000):
        counts[stream.chosen(50, 0.3).numpy()] += 1
    assert counts.sum() / 1e5 == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / 1e5))
    assert chisquare(counts).pvalue > 1e-4
    assert stream.chosen(4, 1.0).tolist() == [0, 1, 2, 3]
