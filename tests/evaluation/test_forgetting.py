"""The formulas on matrices small enough to work out on paper."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from kanlm.evaluation import forgetting as metrics

# Rows are stages 0 to 2, columns domains a, b, c.
LOSSES = np.array(
    [
        [2.0, 3.0, 4.0],
        [2.5, 1.5, 3.5],
        [2.2, 1.8, 1.0],
    ]
)


def test_average_final_loss() -> None:
    # (2.2 + 1.8 + 1.0) / 3
    assert metrics.average_final_loss(LOSSES) == pytest.approx(5.0 / 3)


def test_forgetting_since_just_learned() -> None:
    # a: 2.2 − 2.0, b: 1.8 − 1.5; c was learned last.
    assert metrics.forgetting(LOSSES) == pytest.approx([0.2, 0.3])


def test_forgetting_from_best() -> None:
    losses = LOSSES.copy()
    losses[1, 0] = 1.9  # Stage 1 helped a.
    # a: 2.2 − min(2.0, 1.9), b: 1.8 − min(3.0, 1.5)
    assert metrics.forgetting_from_best(losses) == pytest.approx([0.3, 0.3])
    assert metrics.forgetting(losses) == pytest.approx([0.2, 0.3])


def test_backward_transfer_is_negative_where_domains_were_forgotten() -> None:
    # −(0.2 + 0.3) / 2
    assert metrics.backward_transfer(LOSSES) == pytest.approx(-0.25)


def test_forward_transfer_is_measured_from_the_pretrained_model() -> None:
    # b: 3.0 − 3.0, c: 4.0 − 3.5
    assert metrics.forward_transfer(LOSSES) == pytest.approx([0.0, 0.5])


def test_learning_gain_is_what_the_domains_own_stage_taught() -> None:
    # b: 3.0 − 1.5, c: 3.5 − 1.0
    assert metrics.learning_gain(LOSSES) == pytest.approx([1.5, 2.5])


def test_one_stage_forgets_and_gains_nothing() -> None:
    single = np.array([[2.0, 3.0]])
    assert metrics.average_final_loss(single) == 2.0
    assert np.isnan(metrics.backward_transfer(single))
    for metric in (
        metrics.forgetting,
        metrics.forgetting_from_best,
        metrics.forward_transfer,
        metrics.learning_gain,
        metrics.normalised_forgetting,
    ):
        assert metric(single).shape == (0,)


def test_domains_never_trained_on_are_left_out() -> None:
    wider = np.hstack([LOSSES, [[9.0], [8.0], [7.0]]])
    for name in ("average_final_loss", "backward_transfer"):
        assert getattr(metrics, name)(wider) == getattr(metrics, name)(LOSSES)
    for name in ("forgetting", "forgetting_from_best", "forward_transfer", "learning_gain"):
        np.testing.assert_array_equal(getattr(metrics, name)(wider), getattr(metrics, name)(LOSSES))


def test_more_stages_than_domains_are_refused() -> None:
    with pytest.raises(ValueError, match="3 stages but 2 domains"):
        metrics.forgetting(LOSSES[:, :2])


def test_intransigence_is_against_what_could_have_been_learned() -> None:
    # b: 1.5 − 1.4, c: 1.0 − 1.2 (better than the reference); a is no stage after pretraining.
    reference = np.array([9.0, 1.4, 1.2])
    assert metrics.intransigence(LOSSES, reference) == pytest.approx([0.1, -0.2])


def test_normalised_forgetting_is_a_share_of_what_was_taught() -> None:
    # b: F = 0.3 of G = 3.0 − 1.5; a: F = 0.2 of 8.0 − 2.0 where the untrained loss is known.
    assert metrics.normalised_forgetting(LOSSES) == pytest.approx([np.nan, 0.2], nan_ok=True)
    known = metrics.normalised_forgetting(LOSSES, untrained=np.array(8.0))
    assert known == pytest.approx([0.2 / 6, 0.2])


def test_nothing_taught_leaves_no_share_to_forget() -> None:
    losses = LOSSES.copy()
    losses[1, 1] = 3.0
    assert np.isnan(metrics.normalised_forgetting(losses)[1])
    losses[1, 1] = 3.2
    assert np.isnan(metrics.normalised_forgetting(losses)[1])


def test_stability_gap() -> None:
    # Against 2.0: 0.5, 0.9, (not measured), 0.1; at most 0.9, on average 1.5 / 3.
    gap = metrics.stability_gap(np.array([2.0, 2.5, 2.9, np.nan, 2.1]))
    assert gap.max == pytest.approx(0.9)
    assert gap.mean == pytest.approx(0.5)
    # It may lie below 0: here the loss only fell, by 0.1 and by 0.3.
    gap = metrics.stability_gap(np.array([2.0, 1.9, 1.7]))
    assert gap.max == pytest.approx(-0.1)
    assert gap.mean == pytest.approx(-0.2)


@pytest.mark.parametrize("losses", [[2.0], [np.nan, 1.0, 2.0], [2.0, np.nan]])
def test_no_stability_gap_without_a_start_and_something_after_it(losses: list[float]) -> None:
    assert np.isnan(metrics.stability_gap(np.array(losses))).all()


def test_drift_is_the_divergence_that_scipy_computes() -> None:
    rng = np.random.default_rng(0)
    before, after = rng.dirichlet(np.ones(7), (2, 3, 5)), rng.dirichlet(np.ones(7), (2, 3, 5))
    expected = stats.entropy(before, after, axis=-1).mean(axis=-1)
    np.testing.assert_allclose(metrics.drift(np.log(before), np.log(after)), expected, rtol=1e-12)


def test_drift_of_what_had_no_probability() -> None:
    # (½ log (½ / ¼)) · 2 = log 2, from the two words that had any.
    before = np.array([[0.5, 0.5, 0.0]])
    with np.errstate(divide="ignore"):
        drift = metrics.drift(np.log(before), np.log([[0.25, 0.25, 0.5]]))
        nowhere = metrics.drift(np.log(before), np.log([[1.0, 0.0, 0.0]]))
    assert drift == pytest.approx(np.log(2))
    assert nowhere == np.inf


def test_columns_follow_the_order_of_each_seed() -> None:
    shuffled = LOSSES[:, [0, 2, 1]]
    both = np.stack([LOSSES, shuffled])
    ordered = metrics.in_order(both, np.array([[0, 1, 2], [0, 2, 1]]))
    np.testing.assert_array_equal(ordered, np.stack([LOSSES, LOSSES]))
    np.testing.assert_array_equal(metrics.in_order(both, np.array([0, 1])), both[..., :2])


@pytest.mark.parametrize("order", [[0, 1, 1], [0, 1, 3], [-1, 0, 1]])
def test_impossible_orders_are_refused(order: list[int]) -> None:
    with pytest.raises(ValueError, match="order"):
        metrics.in_order(LOSSES, np.array(order))


def test_what_was_not_measured_is_not_made_up() -> None:
    losses = LOSSES.copy()
    losses[2, 0] = np.nan
    assert np.isnan(metrics.average_final_loss(losses))
    assert np.isnan(metrics.backward_transfer(losses))
    assert metrics.forgetting(losses) == pytest.approx([np.nan, 0.3], nan_ok=True)
    assert metrics.forgetting_from_best(losses) == pytest.approx([np.nan, 0.3], nan_ok=True)


@given(arrays(float, (2, 3, 3, 4), elements=st.floats(0.1, 10)))
def test_leading_axes_are_as_if_each_stood_alone(losses: np.ndarray) -> None:
    reference = np.array([1.0, 2.0, 3.0, 4.0])
    for metric in (
        metrics.average_final_loss,
        metrics.forgetting,
        metrics.forgetting_from_best,
        metrics.backward_transfer,
        metrics.forward_transfer,
        metrics.learning_gain,
        metrics.normalised_forgetting,
        lambda losses: metrics.intransigence(losses, reference),
        lambda losses: metrics.stability_gap(losses).mean,
    ):
        alone = [[metric(losses[i, j]) for j in range(3)] for i in range(2)]
        np.testing.assert_array_equal(metric(losses), alone)


@given(arrays(float, (4, 4), elements=st.floats(0.1, 10)))
def test_what_was_gained_and_lost_adds_up(losses: np.ndarray) -> None:
    """From the pretrained model's loss on j to the final one, every step is accounted for."""
    gain, transfer = metrics.learning_gain(losses), metrics.forward_transfer(losses)
    lost = np.append(metrics.forgetting(losses)[1:], 0)
    np.testing.assert_allclose(losses[0, 1:] - losses[-1, 1:], transfer + gain - lost, atol=1e-12)
    assert (metrics.forgetting_from_best(losses) >= metrics.forgetting(losses)).all()
