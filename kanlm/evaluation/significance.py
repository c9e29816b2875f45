"""Whether two arms differ, are equivalent, or neither has been shown.

The unit is the pretraining seed: a difference is one number for each seed that both arms
were trained with, on the same data in the same order and scored on the same documents. Two
questions are asked of such differences, each with its own test:

- do they differ? A two-sided sign-flip permutation test of the mean, exact, which assumes that
  without a difference each sign was as likely (Fisher's test of paired differences; `scipy`).
- are they equivalent? Two one-sided t tests (TOST; Schuirmann 1987) of whether the mean lies
  within a margin that was stated beforehand (`statsmodels`).

Neither answered is "undecided", which is not a no. Several hypotheses are corrected together by
Holm's procedure (`statsmodels`), each question for itself.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy import stats

from kanlm.errors import UserError

Verdict = Literal["different", "equivalent", "undecided"]
#: One number for each seed.
BySeed = Sequence[float] | np.ndarray

#: Differences in bits per byte that are of no consequence.
MARGIN = 0.01
#: Chance at which a hypothesis is rejected that holds.
ALPHA = 0.05
#: Most seeds whose signs are flipped in all ways; beyond it, so many random flips are drawn.
_EXACT_SEEDS = 16
_RANDOM_FLIPS = 99_999


@dataclass(frozen=True)
class Comparison:
    """What is known of a difference between two arms.

    Attributes:
        differences: by seed, first arm − other, in bits per byte.
        p: of the sign-flip test.
        equivalence_p: of the equivalence test, the larger of its two.
        adjusted_p: `p` after Holm's correction; `p` itself for a single hypothesis.
        adjusted_equivalence_p: likewise.
        margin: of the equivalence test, in bits per byte.
        alpha: level of both tests.
    """

    differences: tuple[float, ...]
    p: float
    equivalence_p: float
    adjusted_p: float
    adjusted_equivalence_p: float
    margin: float
    alpha: float

    @property
    def mean(self) -> float:
        return float(np.mean(self.differences))

    @property
    def negligible(self) -> bool:
        """Whether the difference, if there is one, has been shown to be less than the margin."""
        return self.adjusted_equivalence_p < self.alpha

    @property
    def verdict(self) -> Verdict:
        """`different` wins where both were shown: a difference, and a negligible one."""
        if self.adjusted_p < self.alpha:
            return "different"
        return "equivalent" if self.negligible else "undecided"


def compare(differences: BySeed, *, margin: float = MARGIN, alpha: float = ALPHA) -> Comparison:
    """Test the one primary hypothesis, which nothing corrects.

    Args:
        differences: one for each seed, first arm − other.
        margin: below which a difference is of no consequence; stated before the first run.
        alpha: level of both tests.

    Raises:
        UserError: fewer than two seeds.
        ValueError: a difference is no finite number, or the margin is not positive.
    """
    p, q = sign_flip_p(differences), equivalence_p(differences, margin)
    return Comparison(tuple(float(value) for value in differences), p, q, p, q, margin, alpha)


def compare_all(
    differences: Mapping[str, BySeed], *, margin: float = MARGIN, alpha: float = ALPHA
) -> dict[str, Comparison]:
    """Test a family of secondary hypotheses, corrected together by Holm's procedure.

    Args:
        differences: hypothesis → one difference for each seed, first arm − other.
        margin, alpha: as of `compare`.

    Raises:
        UserError, ValueError: as of `compare`.
    """
    alone = {
        name: compare(values, margin=margin, alpha=alpha) for name, values in differences.items()
    }
    adjusted = holm([comparison.p for comparison in alone.values()])
    equivalent = holm([comparison.equivalence_p for comparison in alone.values()])
    return {
        name: replace(comparison, adjusted_p=p, adjusted_equivalence_p=q)
        for (name, comparison), p, q in zip(alone.items(), adjusted, equivalent, strict=True)
    }


def sign_flip_p(differences: BySeed) -> float:
    """p of the two-sided sign-flip test of a mean of 0.

    Exact up to 16 seeds: the share of the 2ⁿ ways of choosing signs whose mean is as far from
    0. Beyond, by 99,999 random choices from a fixed seed.

    Raises:
        UserError, ValueError: as of `compare`.
    """
    values = _checked(differences)
    result = stats.permutation_test(
        (values,),
        np.mean,
        permutation_type="samples",
        # All 2ⁿ choices make the test exact.
        n_resamples=2 ** len(values) if len(values) <= _EXACT_SEEDS else _RANDOM_FLIPS,
        alternative="two-sided",
        vectorized=True,
        rng=np.random.default_rng(0),
    )
    return float(result.pvalue)


def smallest_p(seeds: int, tests: int = 1) -> float:
    """The smallest p that a sign-flip test can reach, min(1, tests · 2 / 2ⁿ).

    It is reached where all differences have one sign. With several tests it is that of Holm's
    first step, which multiplies the smallest p by their number.
    """
    return min(1.0, tests * 2.0 ** (1 - seeds))


def seeds_needed(tests: int = 1, alpha: float = ALPHA) -> int:
    """The fewest seeds with which the smallest p is below alpha: 6 for one test at 0.05."""
    seeds = 2
    while smallest_p(seeds, tests) >= alpha:
        seeds += 1
    return seeds


def equivalence_p(differences: BySeed, margin: float = MARGIN) -> float:
    """p of two one-sided t tests that the mean lies between −margin and margin.

    It assumes differences that are normal, or enough of them. Differences that are all the
    same leave nothing to estimate a spread from: p is then 0 within the margin and 1 without.

    Raises:
        UserError, ValueError: as of `compare`.
    """
    # Takes a quarter of a second, and few commands compare.
    from statsmodels.stats.weightstats import DescrStatsW

    values = _checked(differences)
    if not margin > 0:
        raise ValueError(f"margin = {margin}: expected a positive number of bits per byte")
    if np.ptp(values) == 0:
        return 0.0 if abs(values[0]) < margin else 1.0
    p, *_ = DescrStatsW(values).ttost_mean(-margin, margin)
    return float(p)


def holm(p: Sequence[float]) -> list[float]:
    """p-values adjusted by Holm's step-down procedure, in the order given."""
    from statsmodels.stats.multitest import multipletests

    if not len(p):
        return []
    return np.asarray(multipletests(p, method="holm")[1]).tolist()


def _checked(differences: BySeed) -> np.ndarray:
    values = np.asarray(differences, dtype=float)
    if len(values) < 2:
        raise UserError(f"a test over seeds needs at least two, and there is {len(values)}")
    if not np.isfinite(values).all():
        raise ValueError("differences: expected finite numbers")
    return values
