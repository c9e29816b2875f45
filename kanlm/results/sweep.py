"""What a sweep tried: its settings, and where a choice lies at the edge of what was tried."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from kanlm.results.schema import LARGEST, Edge


def setting_values(trials: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return setting → the values tried, in the order of the trials."""
    values: dict[str, list[Any]] = {}
    for trial in trials:
        for name, value in trial["settings"].items():
            tried = values.setdefault(name, [])
            if value not in tried:
                tried.append(value)
    return values


def edges(trials: Sequence[Mapping[str, Any]]) -> list[Edge]:
    """Return settings of which the chosen trial has the smallest or largest value tried.

    Only of numbers of which several were tried; not of a chosen 0, below which most settings
    have no value. A trial that diverged was tried.

    Args:
        trials: `settings` by dotted name and whether `chosen`.
    """
    chosen = next((trial["settings"] for trial in trials if trial["chosen"]), {})
    found: list[Edge] = []
    for name, values in setting_values(trials).items():
        value: Any = chosen.get(name)
        if len(values) < 2 or not all(map(is_number, values)) or value == 0:
            continue
        ends: list[tuple[Literal["smallest", "largest"], float]] = [
            ("smallest", min(values)),
            ("largest", max(values)),
        ]
        for edge, extreme in ends:
            if value == extreme:
                found.append({"setting": name, "value": value, "edge": edge})
    return found


def is_number(value: object) -> bool:
    """Whether a setting's value has a place on an axis."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= LARGEST
