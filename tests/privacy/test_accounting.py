import json
import math
from pathlib import Path

import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from fedproxy.errors import ConfigError
from fedproxy.privacy.accounting import Release, calibrate, spent

dp = pytest.importorskip("dp_accounting", reason="the extra 'privacy' is not installed")
GOLDEN = Path(__file__).parent.parent / "golden" / "privacy.json"
"""Made by dp-accounting 0.6.0 itself: ``python tests/privacy/golden_privacy.py``."""
CASES = json.loads(GOLDEN.read_text())["cases"]


def test_there_are_twenty_settings_of_both_units_and_all_samplings():
    kinds = {(case["unit"], case["release"]["sampling"], case["accountant"]) for case in CASES}
    assert len(CASES) >= 20
    assert {unit for unit, _, _ in kinds} == {"example", "client"}
    assert {sampling for _, sampling, _ in kinds} == {"poisson", "none", "without_replacement"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_epsilon_is_dp_accountings(case):
    release = Release(**case["release"])
    assert spent([release], case["delta"], case["accountant"]) == pytest.approx(case["epsilon"], rel=1e-6)


@pytest.mark.parametrize(("noise", "steps"), [(1.0, 1), (4.0, 1), (5.0, 50), (20.0, 7)])
@pytest.mark.parametrize("delta", [1e-5, 1e-3])
def test_one_gaussian_has_its_closed_form(noise, steps, delta):
    """Balle and Wang 2018 (arXiv 1805.06530), Theorem 8; n looks at noise z are one at z / sqrt(n)."""
    scale = noise / math.sqrt(steps)

    def left(epsilon):
        shift = epsilon * scale
        upper, lower = norm.cdf(0.5 / scale - shift), norm.logcdf(-0.5 / scale - shift)
        return upper - math.exp(epsilon + lower) - delta

    exact = brentq(left, 0, 200)
    assert spent([Release(noise, steps=steps)], delta) == pytest.approx(exact, rel=2e-3)
    assert spent([Release(noise, steps=steps)], delta) >= exact * (1 - 1e-6)  # never too low
    assert spent([Release(noise, steps=steps)], delta, "rdp") >= exact


def test_releases_add_up_whatever_their_order():
    first, second = Release(1.5, "poisson", 0.1, steps=20), Release(4.0, steps=3)
    one = spent([first, second, first], 1e-5)
    assert one == spent([second, first.times(2)], 1e-5)
    assert one > spent([first.times(2)], 1e-5) > spent([first], 1e-5)
    assert spent([], 1e-5) == 0
    assert spent([first, Release(0.0)], 1e-5) == math.inf


@pytest.mark.parametrize("sampling", ["none", "poisson"])
@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_noise_that_hides_nothing_counts_as_none(accountant, sampling):
    # The square of 1e-160 is 0 in float64: by Renyi divergences of samples nothing would be revealed.
    assert spent([Release(1e-160, sampling, 0.1, steps=30)], 1e-5, accountant) == math.inf


def test_what_reveals_almost_all_is_bounded_by_renyi_divergences_alone():
    # One look at noise z has divergence a / (2 z^2) of order a; distributions would need 1e10 cells here.
    release = Release(1e-3, steps=3)
    assert spent([release], 1e-5) == spent([release], 1e-5, "rdp") >= 3 / (2 * 1e-6)


def test_draws_of_a_fixed_size_and_poisson_samples_do_not_add_up():
    with pytest.raises(ConfigError, match=r"privacy.sampling: releases under adding or removing .* do not add up"):
        spent([Release(1.0), Release(1.0, "without_replacement", drawn=10, of=100)], 1e-5, "rdp")


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize("epsilon", [1.0, 8.0])
def test_calibrated_noise_keeps_the_budget_and_wastes_little(accountant, epsilon):
    plan = Release(0.0, "poisson", 0.1, steps=50)
    noise = calibrate(plan, epsilon, 1e-5, accountant)
    total = spent([Release(noise, "poisson", 0.1, steps=50)], 1e-5, accountant)
    assert 0.998 * epsilon <= total <= epsilon
    if (accountant, epsilon) == ("pld", 8.0):
        assert noise == pytest.approx(0.80, abs=0.005)  # dp-accounting's own calibration gives 0.803


def test_what_was_released_before_leaves_less():
    plan, before = Release(0.0, steps=10), (Release(5.0, steps=10),)
    fresh, later = calibrate(plan, 4.0, 1e-5), calibrate(plan, 4.0, 1e-5, before=before)
    assert later > 1.2 * fresh
    assert spent([*before, Release(later, steps=10)], 1e-5) <= 4.0
    with pytest.raises(ConfigError, match=r"privacy.epsilon must be above the 2.* raise privacy.epsilon"):
        calibrate(plan, 2.0, 1e-5, before=before)
