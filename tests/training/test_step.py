"""Which steps the guard lets through."""

import math
import random

import pytest

from kanlm.config import TrainingSettings
from kanlm.training.step import GUARD_MINIMUM, GUARD_WINDOW, StepGuard

SETTINGS = TrainingSettings()
SKIPPING = TrainingSettings(skip_loss_spikes=True)


def practised(losses: int = GUARD_MINIMUM) -> StepGuard:
    """After ordinary losses of mean 3 and standard deviation 0.1."""
    draw, guard = random.Random(0), StepGuard()
    for _ in range(losses):
        assert guard.should_take(draw.gauss(3, 0.1), 1.0, SETTINGS) == (True, None)
    return guard


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_is_skipped(value: float, where: str):
    guard = StepGuard()
    figures = (value, 1.0) if where == "loss" else (3.0, value)
    for count in (1, 2):
        taken, why = guard.should_take(*figures, SETTINGS)
        assert not taken
        assert why is not None
        assert str(value) in why
        assert (guard.skipped_steps, guard.skipped_in_a_row) == (count, count)
    assert guard.should_take(3.0, 1.0, SETTINGS) == (True, None)
    assert (guard.skipped_steps, guard.skipped_in_a_row) == (2, 0)


@pytest.mark.parametrize(("settings", "taken"), [(SETTINGS, True), (SKIPPING, False)])
def test_a_leap_of_the_loss_is_noted_and_skipped_if_wanted(settings, taken: bool):
    guard = practised()
    found, why = guard.should_take(4.0, 1.0, settings)
    assert found == taken
    assert why is not None
    assert why.startswith("the loss is 4.0000, ")
    assert (guard.loss_spikes, guard.skipped_steps) == (1, not taken)
    assert guard.should_take(3.0, 1.0, settings) == (True, None)


def test_a_fall_of_the_loss_few_losses_and_a_null_threshold_are_no_spikes():
    assert practised().should_take(0.0, 1.0, SKIPPING) == (True, None)
    assert practised(GUARD_MINIMUM - 1).should_take(9.0, 1.0, SKIPPING) == (True, None)
    blind = TrainingSettings(loss_spike_deviations=None)
    assert practised().should_take(9.0, 1.0, blind) == (True, None)


def test_a_loss_that_stays_high_is_a_spike_no_longer():
    """What was left out counts among the losses before, or nothing would be taken ever after."""
    guard = practised(1000)
    assert len(guard.losses) == GUARD_WINDOW
    taken = [guard.should_take(4.0, 1.0, SKIPPING)[0] for _ in range(20)]
    assert taken[0] is False
    assert taken[-1] is True
