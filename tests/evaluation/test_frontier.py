"""Forgetting at equal learning, on curves small enough to work out on paper."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kanlm.evaluation import forgetting
from kanlm.evaluation.frontier import (
    Curve,
    at_equal_learning,
    common_gain,
    frontier,
    frontier_gap,
    learning_curve,
    least_lost_at_gain,
    lost_at_gain,
)
from kanlm.evaluation.losses import losses
from kanlm.evaluation.significance import compare
from kanlm.results.schema import EvaluationKey, Record


def curve(*points: tuple[float, float]) -> Curve:
    gain, lost = np.array(points, dtype=float).T
    return Curve(gain, lost)


OURS = curve((0, 0), (1, 0.1), (2, 0.4), (1.5, 0.05))
THEIRS = curve((0, 0), (0.5, 0.2), (1.6, 0.3))


def test_frontier_is_the_least_loss_of_what_gained_enough():
    # At 0 the start is best; from 0 to 1.5 the point (1.5, 0.05) is; at 2 only the last is left.
    least = frontier(*OURS, at=np.array([0, 0.5, 1.5, 1.6, 2, 2.1]))
    assert least == pytest.approx([0, 0.05, 0.05, 0.4, 0.4, np.nan], nan_ok=True)


def test_frontier_leaves_out_what_was_not_measured():
    points = curve((0, 0), (1, np.nan), (np.nan, -1), (1, 0.3))
    assert frontier(*points, at=np.array([0.5])) == pytest.approx([0.3])


def test_frontier_gap_is_the_mean_difference_over_common_gains():
    # Common gains reach 1.6. Ours: 0.05 up to 1.5, then 0.4 up to 1.6; theirs: 0.2 up to 0.5,
    # then 0.3. (0.5 · (0.05 − 0.2) + 1.0 · (0.05 − 0.3) + 0.1 · (0.4 − 0.3)) / 1.6.
    expected = (0.5 * -0.15 + 1.0 * -0.25 + 0.1 * 0.1) / 1.6
    assert frontier_gap(OURS, THEIRS) == pytest.approx(expected)
    assert frontier_gap(THEIRS, OURS) == pytest.approx(-expected)
    # From 1 on: (0.5 · (0.05 − 0.3) + 0.1 · (0.4 − 0.3)) / 0.6.
    expected = (0.5 * -0.25 + 0.1 * 0.1) / 0.6
    assert frontier_gap(OURS, THEIRS, least=1.0) == pytest.approx(expected)


def test_no_gap_without_a_common_gain():
    assert np.isnan(frontier_gap(OURS, curve((0, 0), (-1, 2))))
    assert np.isnan(frontier_gap(OURS, THEIRS, least=1.6))
    assert np.isnan(frontier_gap(OURS, curve((np.nan, np.nan))))


def test_gaps_are_by_pairs_of_seeds():
    both = Curve(np.stack([OURS.gain] * 2), np.stack([OURS.lost, OURS.lost + 1]))
    twins = Curve(np.stack([THEIRS.gain] * 2), np.stack([THEIRS.lost] * 2))
    one = float(frontier_gap(OURS, THEIRS))
    assert frontier_gap(both, twins) == pytest.approx([one, one + 1])
    with pytest.raises(ValueError, match="pairs"):
        frontier_gap(both, THEIRS)


points = arrays(float, st.tuples(st.just(2), st.integers(1, 8)), elements=st.floats(-3, 3))


@given(points, points)
def test_gap_is_the_one_that_a_fine_grid_of_levels_approaches(ours, theirs):
    top = min(ours[0].max(), theirs[0].max())
    gap = frontier_gap(Curve(*ours), Curve(*theirs))
    if top < 0.1:
        return
    levels = (np.arange(20_000) + 0.5) / 20_000 * top
    approached = frontier(*ours, at=levels) - frontier(*theirs, at=levels)
    assert gap == pytest.approx(approached.mean(), abs=0.02)


@given(points, st.floats(-1, 1))
def test_frontiers_only_rise_and_move_with_what_was_lost(ours, shift):
    levels = np.linspace(-3, 3, 13)
    least = frontier(*ours, at=levels)
    known = least[~np.isnan(least)]
    assert (np.diff(known) >= 0).all()
    np.testing.assert_allclose(frontier(ours[0], ours[1] + shift, levels), least + shift)


def test_loss_at_a_gain_is_interpolated_where_the_run_first_reached_it():
    run = curve((0, 0), (1, 0.2), (2, 0.8), (1.2, 0.9), (3, 1.5))
    # Halfway from 1 to 2: (0.2 + 0.8) / 2. At 2.5, between (1.2, 0.9) and (3, 1.5).
    levels = np.array([0, 1, 1.5, 2.5, 3.1])
    found = [float(lost_at_gain(run, level)) for level in levels]
    expected = [0, 0.2, 0.5, 0.9 + 0.6 * 1.3 / 1.8, np.nan]
    assert found == pytest.approx(expected, nan_ok=True)


def test_checkpoints_that_were_not_measured_are_interpolated_over():
    run = curve((0, 0), (np.nan, np.nan), (2, 0.8))
    assert lost_at_gain(run, np.array(1.0)) == pytest.approx(0.4)


def test_arms_are_compared_at_the_gain_that_both_reached():
    # Seeds × runs × steps; the second run of each seed ends early.
    ours = Curve(
        np.array([[[0, 1, 2], [0, 0.5, np.nan]], [[0, 1, 3], [0, 2, np.nan]]]),
        np.array([[[0, 0.2, 0.6], [0, 0.1, np.nan]], [[0, 0.3, 0.9], [0, 0.1, np.nan]]]),
    )
    theirs = Curve(np.array([[[0.0, 4]], [[0, 1]]]), np.array([[[0.0, 2]], [[0, 0.7]]]))
    # Seed 0: min(2, 4), seed 1: min(3, 1).
    assert common_gain(ours.gain, theirs.gain) == pytest.approx([2, 1])
    half = common_gain(ours.gain, theirs.gain, share=0.5)
    assert half == pytest.approx([1, 0.5])
    # Seed 0 at 1: 0.2 (the second run never got there); seed 1 at 0.5: min(0.15, 0.025).
    assert least_lost_at_gain(ours, half) == pytest.approx([0.2, 0.025])
    # 1/4 of 2; half of 0.7.
    assert least_lost_at_gain(theirs, half) == pytest.approx([0.5, 0.35])
    assert np.isnan(least_lost_at_gain(ours, np.array([9, 9]))).all()


def test_curves_of_a_stage():
    # Domains × steps: two old ones, then the new one.
    stage = np.array([[2.0, 2.5, 2.2], [1.0, 1.1, 1.4], [4.0, 3.0, 2.0]])
    gain, lost = learning_curve(stage, new=2, old=[0, 1])
    assert gain == pytest.approx([0, 1, 2])
    assert lost == pytest.approx([0, 0.3, 0.3])  # (0.5 + 0.1) / 2, (0.2 + 0.4) / 2
    since = learning_curve(stage, new=2, old=[0, 1], learned=np.array([1.8, 0.6, 9.0]))
    assert since.lost == pytest.approx([0.3, 0.6, 0.6])  # (0.2 + 0.4) / 2 more


def test_a_curve_ends_at_the_forgetting_of_the_matrix():
    rng = np.random.default_rng(0)
    steps = rng.uniform(1, 3, (5, 3, 3, 4))  # seeds, stages, domains, steps
    matrix = steps[..., -1]
    gain, lost = learning_curve(
        steps[:, 2], new=2, old=[0, 1], learned=np.diagonal(matrix, axis1=-2, axis2=-1)
    )
    np.testing.assert_allclose(lost[:, -1], forgetting.forgetting(matrix).mean(axis=-1))
    np.testing.assert_allclose(gain[:, -1], steps[:, 2, 2, 0] - matrix[:, 2, 2])


@pytest.mark.parametrize("old", [[], [0, 2]])
def test_old_domains_are_others_than_the_new(old):
    with pytest.raises(ValueError, match="old"):
        learning_curve(np.ones((3, 2)), new=2, old=old)


def records(cost: dict[str, float], seeds: int) -> list[Record]:
    """A stage of each arm with two rates; prose gets worse by `cost` a bit of code learned.

    The arms learn at different speeds, and the higher rate costs three times as much.
    """
    rng = np.random.default_rng(0)
    found = []
    for (arm, lost), seed in itertools.product(cost.items(), range(seeds)):
        noise = rng.normal(0, 0.002)
        for rate, step in itertools.product((1, 3), (0, 10, 20, 40)):
            gain = step / 40 * (0.8 if arm == "gelu" else 1.2)
            bits = {"code": 3 - gain, "prose": 2 + gain * (rate * lost + noise)}
            for domain, value in bits.items():
                key = EvaluationKey(
                    arm=arm, seed=seed, strategy=f"plain, rate {rate}", stage=1, domain=domain,
                    step=step, split="validation",
                )  # fmt: skip
                nats = value * 500 * math.log(2)
                sums = {"nats": nats, "tokens": 100, "words": 90, "bytes": 500}
                found.append(Record.of(key, sums))
    return found


@pytest.mark.parametrize(
    ("cost", "verdict", "difference"),
    [
        ({"kan": 0.10, "gelu": 0.20}, "different", -0.06),  # At 0.6: 0.06 − 0.12.
        ({"kan": 0.15, "gelu": 0.15}, "equivalent", 0.0),
    ],
)
def test_from_records_to_a_verdict(cost, verdict, difference):
    array = losses(records(cost, seeds=6), domains=["prose", "code"])
    curves = {}
    for arm in cost:
        # Seeds, strategies (which are the runs), stages, domains, steps.
        stage = array.select(arm=arm, stage=1)
        curves[arm] = learning_curve(stage, new=1, old=[0])
    matched = at_equal_learning(curves, share=0.75)
    np.testing.assert_allclose(matched.gain, 0.6)  # Of 0.8, which is all that GELU gained.
    comparison = compare(matched.lost["kan"] - matched.lost["gelu"])
    assert comparison.verdict == verdict
    assert comparison.mean == pytest.approx(difference, abs=0.003)


def test_arms_at_equal_learning_have_the_same_seeds():
    two, three = (Curve(np.zeros((n, 1, 2)), np.zeros((n, 1, 2))) for n in (2, 3))
    with pytest.raises(ValueError, match="expected equally many"):
        at_equal_learning({"kan": two, "gelu": three}, share=1.0)


def test_arms_are_compared_where_it_is_known_what_both_lost():
    gain = np.array([[[0.0, 0.5, 1.0]]])
    ours = Curve(gain, np.array([[[0.0, 0.2, np.nan]]]))
    theirs = Curve(gain, np.array([[[0.0, 0.1, 0.3]]]))
    found = at_equal_learning({"ours": ours, "theirs": theirs}, share=1.0)
    assert found.gain == pytest.approx([0.5])
    assert found.lost["ours"] == pytest.approx([0.2])
    assert found.lost["theirs"] == pytest.approx([0.1])
