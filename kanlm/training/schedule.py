"""Learning-rate schedules as pure functions of the step.

The trainer sets the rate itself before every update, so that a resumed run needs no
scheduler state and a step past the end keeps the last rate instead of going negative.
"""

import math

from kanlm.config import ScheduleSettings


def learning_rate_ratio(schedule: ScheduleSettings, step: int, steps: int) -> float:
    """Fraction of the peak rate for update `step` (0 for the first) of `steps`.

    All kinds rise linearly over `warmup_steps`, reaching 1 at the last of them. `cosine`
    (Loshchilov & Hutter 2017, without restarts) then falls to `final_ratio` over the rest;
    `warmup-stable-decay` (Hu et al. 2024, MiniCPM) stays at 1 and falls linearly over the
    last `decay_fraction` of all steps; `constant` stays.
    """
    warmup = schedule.warmup_steps
    if warmup == "auto":
        raise ValueError("warmup_steps = auto: a schedule needs its number, as of `resolve`")
    step = min(step, steps - 1)
    if step < warmup:
        return (step + 1) / warmup
    if schedule.kind == "constant":
        return 1.0
    if schedule.kind == "cosine":
        progress = _progress(step, warmup, steps)
        falling = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        start = max(warmup, round(steps * (1 - schedule.decay_fraction)))
        falling = 1 - _progress(step, start, steps)
    return schedule.final_ratio + (1 - schedule.final_ratio) * falling


def _progress(step: int, start: int, end: int) -> float:
    """How far `step` is on the way from `start` to the last update before `end`, 0 before."""
    return max(step - start, 0) / max(end - 1 - start, 1)
