"""What a sweep tried: its settings, and where a choice lies at the edge of what was tried."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

#: Beyond this, differences and axes are no numbers any more.
LARGEST = 1e100


def setting_values(trials: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Setting → the values tried, in the order of the trials."""
    values: dict[str, list[Any]] = {}
    for trial in trials:
        for name, value in trial["settings"].items():
            tried = values.setdefault(name, [])
            if value not in tried:
                tried.append(value)
    return values


def edges(trials: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Settings of which the chosen trial has the smallest or the largest value that was tried.

    Only of numbers of which several were tried; not of a chosen 0, below which most settings
    have no value. A trial that diverged was tried.

    Arguments:
        trials: `settings` by dotted name and whether `chosen`.
    """
    chosen = next((trial["settings"] for trial in trials if trial["chosen"]), {})
    found = []
    for name, values in setting_values(trials).items():
        value = chosen.get(name)
        if len(values) < 2 or not all(map(is_number, values)) or value == 0:
            continue
        for edge, extreme in (("smallest", min(values)), ("largest", max(values))):
            if value == extreme:
                found.append({"setting": name, "value": value, "edge": edge})
    return found


def is_number(value: object) -> bool:
    """Whether a setting's value has a place on an axis."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= LARGEST


def short_names(settings: Sequence[str]) -> dict[str, str]:
    """Dotted setting → its last part, where that names no other."""
    last = [name.rpartition(".")[2] for name in settings]
    return {
        name: short if last.count(short) == 1 else name
        for name, short in zip(settings, last, strict=True)
    }


def written(value: Any) -> str:
    """A setting's value as a user would write it."""
    if is_number(value):
        return f"{value:g}" if float(f"{value:g}") == value else str(value)
    return value if isinstance(value, str) else json.dumps(value)
