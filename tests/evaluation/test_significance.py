"""Verdicts against hand-made cases, and each test against another source of its p."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from kanlm.errors import UserError
from kanlm.evaluation.significance import (
    compare,
    compare_all,
    equivalence_p,
    holm,
    seeds_needed,
    sign_flip_p,
    smallest_p,
)

#: Whole numbers, whose means are exact, so that ties are ties.
whole = st.lists(st.integers(-9, 9), min_size=2, max_size=8)


def t_test_p(differences: list[float], mean: float, alternative: str = "two-sided") -> float:
    result: Any = stats.ttest_1samp(differences, mean, alternative=alternative)
    return float(result.pvalue)


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        # All of one sign: of 2⁶ choices two are as far from 0.
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], 2 / 64),
        ([-0.1, -0.2, -0.3, -0.4, -0.5, -0.6], 2 / 64),
        # Sum 17; ±: 1 2 3 4 8 and −1: sums of 17 or more are all plus (19) and this one.
        ([-1, 2, 3, 4, 8, 1], 2 * 3 / 64),
        ([1, 2, 3, 4, 5], 2 / 32),
        ([1, -1], 1.0),
        ([0, 0, 0], 1.0),
    ],
)
def test_sign_flips_counted_by_hand(differences, expected):
    assert sign_flip_p(differences) == expected


@given(whole)
def test_sign_flip_p_is_the_share_of_means_as_far_from_zero(differences):
    sums = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    share = np.mean([value >= abs(sum(differences)) for value in sums])
    assert sign_flip_p(differences) == pytest.approx(min(1.0, float(share)))


def test_many_seeds_are_drawn_at_random_from_a_fixed_seed():
    differences = list(np.random.default_rng(0).normal(0.3, 1, 40))
    p = sign_flip_p(differences)
    assert p == sign_flip_p(differences)
    assert p == pytest.approx(t_test_p(differences, 0), abs=0.02)


def test_smallest_p_by_number_of_seeds_and_tests():
    assert [smallest_p(n) for n in (2, 5, 6, 8)] == [0.5, 0.0625, 0.03125, 0.0078125]
    assert smallest_p(8, tests=6) == pytest.approx(6 / 128)
    assert smallest_p(3, tests=10) == 1
    # Six seeds serve one test; two need seven; six need eight.
    assert [seeds_needed(tests) for tests in (1, 2, 3, 6, 7)] == [6, 7, 7, 8, 9]


@settings(max_examples=5)  # statsmodels collects garbage at each.
@given(whole, st.integers(1, 5))
def test_no_test_goes_below_its_smallest_p(differences, tests):
    family = {str(i): differences for i in range(tests)}
    for comparison in compare_all(family).values():
        assert comparison.adjusted_p >= smallest_p(len(differences), tests) - 1e-12


def test_holm_by_hand():
    # 0.01 · 3; then 0.03 · 2; then 0.04 · 1, but not less than the one before.
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == pytest.approx([1, 1])
    assert holm([]) == []


@given(st.lists(st.floats(-0.05, 0.05), min_size=2, max_size=10), st.floats(0.001, 0.05))
def test_equivalence_is_two_one_sided_t_tests(differences, margin):
    if np.std(differences) < 1e-6:
        return
    above = t_test_p(differences, -margin, "greater")
    below = t_test_p(differences, margin, "less")
    assert equivalence_p(differences, margin) == pytest.approx(max(above, below), abs=1e-9)


def test_differences_that_are_all_the_same():
    assert equivalence_p([0.009, 0.009], 0.01) == 0
    assert equivalence_p([0.01, 0.01], 0.01) == 1
    assert equivalence_p([-0.02, -0.02], 0.01) == 1


@pytest.mark.parametrize(
    ("differences", "verdict", "negligible"),
    [
        ([0.03, 0.05, 0.04, 0.03, 0.06, 0.04], "different", False),
        ([0.001, -0.002, 0.001, 0.000, -0.001, 0.002], "equivalent", True),
        # A real difference of no consequence.
        ([0.001, 0.002, 0.001, 0.002, 0.001, 0.002], "different", True),
        ([0.05, -0.04, 0.06, -0.02, 0.03, 0.01], "undecided", False),
        # Five seeds of one sign cannot reach 0.05.
        ([0.03, 0.05, 0.04, 0.03, 0.06], "undecided", False),
    ],
)
def test_verdicts(differences, verdict, negligible):
    comparison = compare(differences, margin=0.01)
    assert comparison.verdict == verdict
    assert comparison.negligible == negligible
    assert comparison.mean == pytest.approx(sum(differences) / len(differences))
    assert comparison.adjusted_p == comparison.p


def test_secondary_hypotheses_are_corrected_together():
    clear = [0.03, 0.05, 0.04, 0.03, 0.06, 0.04]
    # p = 2/64 alone, 3 · 2/64 = 0.094 among three: six seeds are too few.
    family = compare_all(dict.fromkeys(("law", "code", "prose"), clear))
    assert {c.verdict for c in family.values()} == {"undecided"}
    assert family["law"].adjusted_p == pytest.approx(6 / 64)
    eight = [*clear, 0.05, 0.03]
    family = compare_all(dict.fromkeys(("law", "code", "prose"), eight))
    assert {c.verdict for c in family.values()} == {"different"}


def test_without_a_difference_few_verdicts_are_different():
    rng = np.random.default_rng(1)
    studies = rng.normal(0, 0.02, (400, 6))
    found = [compare(study).verdict for study in studies]
    # Each with probability 2/64; 0.066 is four standard errors above.
    assert found.count("different") / 400 < 0.066
    # At the edge of the margin equivalence is claimed at most so often as alpha.
    edge = rng.normal(0.01, 0.003, (400, 6))
    assert np.mean([equivalence_p(study) < 0.05 for study in edge]) < 0.094


def test_too_few_seeds_are_refused():
    with pytest.raises(UserError, match="at least two, and there is 1"):
        compare([0.1])


@pytest.mark.parametrize(("differences", "margin"), [([0.1, np.nan], 0.01), ([0.1, 0.2], 0.0)])
def test_what_no_test_can_take_is_refused(differences, margin):
    with pytest.raises(ValueError, match="expected"):
        compare(differences, margin=margin)
