"""The clip that follows a quantile: its law, its share of the budget, and where it settles."""

import math

import pytest
import torch

from fedproxy.privacy.accounting import Release, spent
from fedproxy.privacy.adaptive_clip import next_clip, split_noise


@pytest.mark.parametrize("noise", [0.3, 1.0, 7.0])
def test_an_update_and_its_count_reveal_what_the_whole_noise_would(noise):
    """A row of an update and of +1/2 or -1/2 is one Gaussian release after its parts are scaled to equal noise."""
    of_update, of_count = split_noise(noise)
    moved = math.hypot(1 / of_update, 0.5 / of_count)  # how far one client moves the pair, in deviations
    assert moved == pytest.approx(1 / noise, rel=1e-12)
    assert spent([Release(1 / moved)], 1e-5) == pytest.approx(spent([Release(noise)], 1e-5), rel=1e-9)
    assert of_update == pytest.approx(1.05 * noise)


def test_no_noise_stays_none():
    assert split_noise(0.0) == (0.0, 0.0)


@pytest.mark.parametrize(("within", "factor"), [(0.5, 1.0), (1.0, math.exp(-0.1)), (0.0, math.exp(0.1))])
def test_the_clip_moves_by_the_papers_geometric_step(within, factor):
    assert next_clip(2.0, within, 0.5) == pytest.approx(2.0 * factor)


def test_a_noised_share_moves_no_further_than_a_share_can():
    assert next_clip(1.0, 37.0, 0.5) == next_clip(1.0, 1.0, 0.5)
    assert next_clip(1.0, -37.0, 0.5) == next_clip(1.0, 0.0, 0.5)


@pytest.mark.parametrize("start", [0.05, 40.0])
def test_from_any_start_the_clip_settles_at_the_quantile(start):
    norms = torch.linspace(1.0, 3.0, 401)  # of which 70 % are at most 2.4
    clip = start
    for _ in range(200):
        clip = next_clip(clip, float((norms <= clip).double().mean()), 0.7)
    assert clip == pytest.approx(2.4, abs=0.02)
