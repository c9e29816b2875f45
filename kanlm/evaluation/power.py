"""How likely a planned study is to find what it looks for, from the spread of a few pilot seeds.

Assumed throughout: differences between the arms are normal over seeds, with the pilot's
standard deviation. Of two seeds that is hardly known (its 80% interval spans a factor of 13),
so that power is given at the ends of that interval, too. The effect is stated, not taken from
the pilot, where a large one is as likely to be luck.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from kanlm.errors import UserError
from kanlm.evaluation.significance import ALPHA, MARGIN, smallest_p

#: Share of intervals of a standard deviation that hold the true one.
CONFIDENCE = 0.8
#: Simulated studies; the standard error of a power is at most 0.011.
STUDIES = 2000
#: Ways of choosing signs that are tried; more are drawn at random.
_FLIPS = 4096


@dataclass(frozen=True)
class Spread:
    """Standard deviation over seeds, in bits per byte, and its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Power:
    """Chances of a planned number of seeds.

    Attributes:
        seeds: pairs of models.
        smallest_p: that the sign-flip test can reach after Holm's first step.
        difference: chance to call a true difference of the stated effect `different`; at the
            spread itself, at the interval's low end and at its high end.
        equivalence: chance to call arms without any difference `equivalent`; likewise.
    """

    seeds: int
    smallest_p: float
    difference: tuple[float, float, float]
    equivalence: tuple[float, float, float]


def spread(pilot: Sequence[float], confidence: float = CONFIDENCE) -> Spread:
    """Estimate the standard deviation of normal differences, with its χ² interval.

    Args:
        pilot: differences between two arms, one for each seed.
        confidence: share of such intervals that should hold the true one.

    Raises:
        UserError: fewer than two seeds.
    """
    n = len(pilot)
    if n < 2:
        raise UserError(f"a spread over seeds needs at least two, and there is {n}")
    value = float(np.std(pilot, ddof=1))
    below, above = stats.chi2(n - 1).interval(confidence)
    low, high = (value * math.sqrt((n - 1) / end) for end in (above, below))
    return Spread(value, low, high)


def pilot_power(
    pilot: Sequence[float],
    seeds: Sequence[int],
    *,
    effect: float = MARGIN,
    margin: float = MARGIN,
    alpha: float = ALPHA,
    tests: int = 1,
) -> list[Power]:
    """What studies of several sizes could find.

    Args:
        pilot: differences between two arms, one for each pilot seed, in bits per byte.
        seeds: numbers of seeds to consider.
        effect: true difference that is looked for.
        margin: of the equivalence test.
        alpha: level of both tests.
        tests: hypotheses that are corrected together; the power is that of Holm's first step,
            the least it can be.

    Raises:
        UserError: fewer than two pilot seeds.
    """
    known = spread(pilot)
    spreads = (known.value, known.low, known.high)
    level = alpha / tests
    return [
        Power(
            seeds=n,
            smallest_p=smallest_p(n, tests),
            difference=_three(difference_power(n, effect, sd, level) for sd in spreads),
            equivalence=_three(equivalence_power(n, margin, sd, level) for sd in spreads),
        )
        for n in seeds
    ]


def difference_power(seeds: int, effect: float, sd: float, alpha: float = ALPHA) -> float:
    """Chance that the sign-flip test rejects, by simulation from a fixed seed."""
    if smallest_p(seeds) >= alpha:
        return 0.0
    rng = np.random.default_rng(0)
    result = stats.permutation_test(
        (rng.normal(effect, sd, (STUDIES, seeds)),),
        np.mean,
        permutation_type="samples",
        n_resamples=_FLIPS,
        batch=max(1, 2**22 // (STUDIES * seeds)),
        vectorized=True,
        axis=-1,
        rng=rng,
    )
    return float(np.mean(np.asarray(result.pvalue) < alpha))


def equivalence_power(seeds: int, margin: float, sd: float, alpha: float = ALPHA) -> float:
    """Chance that two one-sided t tests find equivalence where there is no difference."""
    from statsmodels.stats.weightstats import DescrStatsW

    differences = np.random.default_rng(0).normal(0, sd, (seeds, STUDIES))
    p, *_ = DescrStatsW(differences).ttost_mean(-margin, margin)
    return float(np.mean(np.asarray(p) < alpha))


def _three(values: Iterable[float]) -> tuple[float, float, float]:
    first, second, third = values
    return first, second, third
