import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kanlm.config import ScheduleSettings
from kanlm.training.schedule import learning_rate_ratio

KINDS = ("cosine", "warmup-stable-decay", "constant")


def ratios(steps: int, **settings) -> list[float]:
    schedule = ScheduleSettings(**settings)
    return [learning_rate_ratio(schedule, step, steps) for step in range(steps)]


def test_warm_up_is_linear_and_reaches_the_peak_at_its_last_step():
    assert ratios(8, kind="constant", warmup_steps=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_cosine_follows_its_formula():
    values = ratios(11, kind="cosine", warmup_steps=0, final_ratio=0.0)
    assert values == pytest.approx([(1 + math.cos(math.pi * k / 10)) / 2 for k in range(11)])


def test_warmup_stable_decay_holds_and_then_falls_linearly():
    values = ratios(
        10, kind="warmup-stable-decay", warmup_steps=2, decay_fraction=0.5, final_ratio=0.2
    )
    assert values == pytest.approx([0.5, 1, 1, 1, 1, 1.0, 0.8, 0.6, 0.4, 0.2])


@given(
    kind=st.sampled_from(KINDS),
    steps=st.integers(1, 500),
    warmup=st.integers(0, 500),
    decay=st.floats(0, 1),
    final=st.floats(0, 1),
    step=st.integers(0, 2000),
)
def test_always_between_zero_and_one_and_clamped_past_the_end(
    kind, steps, warmup, decay, final, step
):
    schedule = ScheduleSettings(
        kind=kind, warmup_steps=min(warmup, steps), decay_fraction=decay, final_ratio=final
    )
    ratio = learning_rate_ratio(schedule, step, steps)
    assert 0 <= ratio <= 1
    if step >= steps:
        assert ratio == learning_rate_ratio(schedule, 10**9, steps)
        if kind == "cosine" and steps - 1 > schedule.warmup_steps:
            assert ratio == pytest.approx(final)
