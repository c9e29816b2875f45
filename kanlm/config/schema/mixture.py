"""How much each source of a mixture gives to training, and from which update on."""

import math
from collections.abc import Mapping, Sequence
from typing import Any


def weight_schedule(weight: Any) -> dict[int, float]:
    """Turn a source's weight into a schedule, steps rising.

    Args:
        weight: a number, or update → weight from that one on. JSON makes texts of its keys.

    Raises:
        ValueError: saying what was expected.
    """
    if not isinstance(weight, Mapping):
        if not _is_number(weight) or weight == 0:
            raise ValueError("expected a positive number, or a schedule such as {0: 1.0, 5000: 2}")
        return {0: float(weight)}
    if not all(str(step).isdecimal() for step in weight):
        raise ValueError("expected whole numbers of updates before the colons")
    schedule = {int(step): value for step, value in weight.items()}
    if 0 not in schedule:
        raise ValueError("expected an entry for step 0, the start")
    if not all(map(_is_number, schedule.values())) or not any(schedule.values()):
        raise ValueError("expected weights of 0 or more, not all of them 0")
    return {step: float(schedule[step]) for step in sorted(schedule)}


def mixture_stages(schedules: Sequence[Mapping[int, float]]) -> dict[int, list[float]]:
    """Return the weights of all sources from each update on at which one changes.

    Raises:
        ValueError: at some update there is no source to train on.
    """
    stages = {
        step: [schedule[max(s for s in schedule if s <= step)] for schedule in schedules]
        for step in sorted({step for schedule in schedules for step in schedule})
    }
    for step, weights in stages.items():
        if not any(weights):
            raise ValueError(f"sources: every weight is 0 from update {step} on")
    return stages


def _is_number(value: Any) -> bool:
    """Whether it is a finite number of 0 or more."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 <= value < math.inf
