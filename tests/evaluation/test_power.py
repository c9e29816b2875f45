"""Power against closed forms where there are any, and against what cannot be otherwise."""

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.power import TTestPower

from kanlm.errors import UserError
from kanlm.evaluation.power import difference_power, equivalence_power, pilot_power, spread


def test_without_an_effect_as_many_are_found_as_signs_agree():
    # 2/64, with a standard error of 0.004 over 2,000 studies.
    assert difference_power(6, effect=0, sd=1) == pytest.approx(2 / 64, abs=0.016)


@pytest.mark.parametrize("seeds", [9, 12])
def test_power_of_sign_flips_is_near_to_a_paired_t_test_s(seeds):
    expected = TTestPower().power(effect_size=0.9, nobs=seeds, alpha=0.05)
    assert difference_power(seeds, effect=0.9, sd=1) == pytest.approx(expected, abs=0.06)


def test_six_seeds_find_a_difference_where_all_have_one_sign():
    # At 6 seeds only unanimous signs reach 0.05, and both directions count.
    chance = stats.norm.cdf(0.8)
    expected = chance**6 + (1 - chance) ** 6
    assert difference_power(6, effect=0.8, sd=1) == pytest.approx(expected, abs=0.045)


def test_too_few_seeds_find_no_difference_whatever_its_size():
    assert difference_power(5, effect=100, sd=1) == 0


def test_equivalence_of_a_known_spread():
    # With many seeds t is normal: P(|mean| < margin − 1.645 sd/√n) = 2 Φ(√n margin/sd − 1.645) − 1.
    expected = 2 * stats.norm.cdf(np.sqrt(200) * 0.2 - stats.norm.ppf(0.95)) - 1
    assert equivalence_power(200, margin=0.2, sd=1) == pytest.approx(expected, abs=0.045)


def test_spread_of_two_seeds_is_hardly_known():
    # sd = |a − b| / √2; of χ² with one degree of freedom, the square of a normal, 80% lie
    # between the squares of the 55th and the 95th percentile.
    known = spread([0.004, 0.012])
    assert known.value == pytest.approx(0.008 / np.sqrt(2))
    assert known.low == pytest.approx(known.value / stats.norm.ppf(0.95))
    assert known.high == pytest.approx(known.value / stats.norm.ppf(0.55))


def test_plans_grow_in_power_with_seeds_and_lose_it_with_spread_and_tests():
    few, more = pilot_power([0.0, 0.01], [6, 10])
    assert few.smallest_p == 2 / 64
    for power in (few, more):
        for value, low, high in (power.difference, power.equivalence):
            assert low >= value >= high
    assert more.difference[0] > few.difference[0]
    assert more.equivalence[0] > few.equivalence[0]
    (secondary,) = pilot_power([0.0, 0.01], [6], tests=4)
    assert secondary.smallest_p == 8 / 64
    assert secondary.difference == (0, 0, 0)
    assert secondary.equivalence[0] < few.equivalence[0]


def test_one_pilot_seed_has_no_spread():
    with pytest.raises(UserError, match="at least two, and there is 1"):
        pilot_power([0.1], [6])
