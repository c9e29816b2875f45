"""The formulas on matrices small enough to work out on paper."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kanlm.experiments.continual import metrics

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
    assert metrics.backward_transfer(single) is None
    for metric in (
        metrics.forgetting,
        metrics.forgetting_from_best,
        metrics.forward_transfer,
        metrics.learning_gain,
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


@given(arrays(float, (4, 4), elements=st.floats(0.1, 10)))
def test_what_was_gained_and_lost_adds_up(losses: np.ndarray) -> None:
    """From the pretrained model's loss on j to the final one, every step is accounted for."""
    gain, transfer = metrics.learning_gain(losses), metrics.forward_transfer(losses)
    lost = np.append(metrics.forgetting(losses)[1:], 0)
    np.testing.assert_allclose(losses[0, 1:] - losses[-1, 1:], transfer + gain - lost, atol=1e-12)
    assert (metrics.forgetting_from_best(losses) >= metrics.forgetting(losses)).all()
