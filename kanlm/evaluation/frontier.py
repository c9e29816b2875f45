"""Forgetting at equal learning: learning–forgetting curves and the frontier below them.

A model that learns less forgets less, so that forgetting is compared at the same gain on the
new domain. Every checkpoint of every run of an arm (learning rates, strengths of a strategy)
is a point: what was gained on the new domain, and what was lost on old ones. Its runs are
curves through them, which begin at (0, 0), the model that the stage started from.

Points and curves are of one seed; leading axes (arms, seeds) are kept, and what is NaN was not
measured and is left out. Rates and strengths are chosen by the least forgetting here, so the
losses must be of the validation split, or those of the chosen runs on the test split.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class Curve(NamedTuple):
    """What was gained and lost in the course of a stage, in the unit of the losses."""

    #: (…, steps) on the new domain.
    gain: np.ndarray
    #: (…, steps) on old domains, on average.
    lost: np.ndarray


def learning_curve(
    losses: np.ndarray, *, new: int, old: list[int], learned: np.ndarray | None = None
) -> Curve:
    """What a stage gained on its domain and lost on old ones, from step to step.

    gain(s) = L_new(0) − L_new(s), lost(s) = mean over old domains j of L_j(s) − R_j. With the
    default R_j = L_j(0) this is what the stage itself lost; with R_j = L[j, j] it is what
    `forgetting` measures at the stage's end.

    Args:
        losses: (…, domains, steps) of one stage, before its first update at index 0, all
            measured on the same text.
        new: column of the domain that is trained on.
        old: columns of the domains trained on before, one at least.
        learned: (…, domains) R, losses against which is counted what was lost.
    """
    if not old:
        raise ValueError("old: expected at least one domain")
    if new in old:
        raise ValueError(f"old = {old}: the new domain {new} stands among the old ones")
    start = losses[..., 0] if learned is None else learned
    lost = losses[..., old, :] - start[..., old, np.newaxis]
    return Curve(losses[..., new, :1] - losses[..., new, :], lost.mean(axis=-2))


def frontier(gain: np.ndarray, lost: np.ndarray, at: np.ndarray) -> np.ndarray:
    """F*(g): the least that was lost by any point that gained g or more.

    Args:
        gain, lost: (…, points).
        at: (levels,) g.

    Returns:
        (…, levels), NaN where no point gained that much.
    """
    enough = (gain[..., np.newaxis] >= np.asarray(at)) & ~np.isnan(lost)[..., np.newaxis]
    least = np.where(enough, lost[..., np.newaxis], np.inf).min(axis=-2, initial=np.inf)
    return np.where(enough.any(axis=-2), least, np.nan)


def frontier_gap(ours: Curve, theirs: Curve, *, least: float = 0.0) -> np.ndarray:
    """Mean over common g of F*_ours(g) − F*_theirs(g): negative where ours forgets less.

    F* is a step function, and its mean over g from `least` to the largest gain that both
    reached is computed exactly, from step to step: there is no grid of levels to choose.

    Args:
        ours, theirs: (…, points) each, with as many leading axes of the same lengths (pairs of
            seeds); numbers of points may differ.
        least: g to begin at. Gains near 0, where nobody loses anything, dilute the mean.

    Returns:
        (…), NaN where the two have no gain above `least` in common.
    """
    shape = ours.gain.shape[:-1]
    if shape != theirs.gain.shape[:-1]:
        raise ValueError(f"seeds {shape} and {theirs.gain.shape[:-1]}: expected pairs")
    gaps = [
        _gap(
            Curve(ours.gain[place], ours.lost[place]),
            Curve(theirs.gain[place], theirs.lost[place]),
            least,
        )
        for place in np.ndindex(shape)
    ]
    return np.reshape(gaps, shape)


def common_gain(*gains: np.ndarray, share: float = 1.0) -> np.ndarray:
    """A share of the largest gain that every arm reached: where forgetting may be compared.

    Args:
        gains: of each arm, (…, runs, steps), with the same leading axes (seeds).
        share: of the largest common gain. It is to be stated before the first run.

    Returns:
        (…) one level for each seed, the same for all arms; NaN where an arm has no gain.
    """
    reached = [np.fmax.reduce(gain, axis=(-2, -1)) for gain in gains]
    return share * np.min(reached, axis=0)


def lost_at_gain(curve: Curve, level: np.ndarray) -> np.ndarray:
    """What a run had lost when it first had gained `level`.

    Interpolated linearly in gain, between the first checkpoint that reached the level and the
    one before it.

    Args:
        curve: (…, steps), from (0, 0) on.
        level: (…), broadcastable to the leading axes of the curve.

    Returns:
        (…), NaN where the level was never reached.
    """
    shape = curve.gain.shape[:-1]
    levels = np.broadcast_to(level, shape)
    found = [
        _first_crossing(curve.gain[place], curve.lost[place], float(levels[place]))
        for place in np.ndindex(shape)
    ]
    return np.reshape(found, shape)


def least_lost_at_gain(curves: Curve, level: np.ndarray) -> np.ndarray:
    """The least that any run of an arm had lost when it first had gained `level`.

    Args:
        curves: (…, runs, steps), the runs being rates and strengths.
        level: (…) as from `common_gain`.

    Returns:
        (…), NaN where no run reached the level.
    """
    lost = lost_at_gain(curves, np.asarray(level)[..., np.newaxis])
    return np.fmin.reduce(lost, axis=-1)


class Matched(NamedTuple):
    """What each arm had lost at a gain that all of them reached."""

    #: (seeds,) the gain, by seed the same for all arms.
    gain: np.ndarray
    #: Arm → (seeds,); differences between two of them are paired by seed.
    lost: dict[str, np.ndarray]


def at_equal_learning(arms: Mapping[str, Curve], *, share: float) -> Matched:
    """Compare arms at equal learning: the least each had lost at a common gain.

    Args:
        arms: arm → curves (seeds, runs, steps) of one stage, of the same seeds in the same order.
            A run is a rate and a strength; arms may have different numbers of runs and steps, but
            for a fair comparison each has as many rates as the others.
        share: of the largest gain that all arms reached with a seed; stated before the first run.
            Just below 1 one of the arms is compared at the end of its longest learning.

    Raises:
        ValueError: arms of unequally many seeds.
    """
    seeds = {name: curves.gain.shape[0] for name, curves in arms.items()}
    if len(set(seeds.values())) > 1:
        raise ValueError(f"seeds by arm {seeds}: expected equally many")
    # A gain counts where it is known what it cost.
    gains = (np.where(np.isnan(c.lost), np.nan, c.gain) for c in arms.values())
    gain = common_gain(*gains, share=share)
    return Matched(gain, {name: least_lost_at_gain(curves, gain) for name, curves in arms.items()})


def _gap(ours: Curve, theirs: Curve, least: float) -> float:
    """`frontier_gap` of one pair."""
    reached = [_measured(curve).gain for curve in (ours, theirs)]
    top = min(gain.max(initial=-np.inf) for gain in reached)
    if top <= least:
        return np.nan
    # F* is constant on (a, b] between neighbouring gains a < b of either arm.
    inner = np.concatenate(reached)
    ends = np.unique([least, *inner[(inner > least) & (inner < top)], top])
    difference = frontier(*ours, ends[1:]) - frontier(*theirs, ends[1:])
    return float((np.diff(ends) * difference).sum() / (top - least))


def _first_crossing(gain: np.ndarray, lost: np.ndarray, level: float) -> float:
    """`lost_at_gain` of one run."""
    gain, lost = _measured(Curve(gain, lost))
    reached = np.flatnonzero(gain >= level)
    if not len(reached):
        return np.nan
    after = reached[0]
    if after == 0:
        return float(lost[0])
    before = after - 1
    share = (level - gain[before]) / (gain[after] - gain[before])
    return float(lost[before] + share * (lost[after] - lost[before]))


def _measured(curve: Curve) -> Curve:
    known = ~(np.isnan(curve.gain) | np.isnan(curve.lost))
    return Curve(curve.gain[known], curve.lost[known])
