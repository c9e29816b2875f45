"""Loss against a swept setting, a line an arm; a panel for each value of the other settings."""

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from kanlm.reporting import labels
from kanlm.reporting.figures import STYLE, Picture, arm_style, svg_of
from kanlm.reporting.format import setting_value, short_names
from kanlm.reporting.study import Study
from kanlm.results.sweep import is_number, setting_values

#: Panels of one sweep; its table has all.
PANELS = 12
#: A rate is shown on a logarithmic axis, as is what spans as much.
_SPAN = 4.0


def sweep_pictures(study: Study) -> list[Picture]:
    """Draw a picture for each combination of the settings that are not on the axis."""
    arms = study.results["arms"]
    trials = {name: arm["sweep"]["trials"] for name, arm in arms.items() if "sweep" in arm}
    every = list(itertools.chain(*trials.values()))
    values = setting_values(every)
    if not values:
        return []
    axis = axis_setting(values)
    short = short_names(list(values))
    others = [name for name in values if name != axis]
    panels: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for arm, trial in [(name, trial) for name in trials for trial in trials[name]]:
        at = ", ".join(
            f"{short[name]} {setting_value(trial['settings'][name])}"
            for name in others
            if name in trial["settings"]
        )
        if axis in trial["settings"]:
            panels.setdefault(at, {}).setdefault(arm, []).append(trial)
    pictures = []
    for number, (at, by_arm) in enumerate(itertools.islice(panels.items(), PANELS)):
        with mpl.rc_context(STYLE):
            figure, numbered = sweep_figure(study, axis, values[axis], by_arm, every)
            pictures.append(
                Picture(
                    f"Loss by {short[axis]}{f', {at}' if at else ''}",
                    svg_of(figure, f"sweep-{number}"),
                    key=labels.key([setting_value(value) for value in values[axis]])
                    if numbered
                    else "",
                )
            )
    return pictures


def axis_setting(values: Mapping[str, Sequence[Any]]) -> str:
    """Choose the setting on the axis: a learning rate, else that with most values tried."""

    def rank(name: str) -> tuple[bool, bool, int]:
        numbers = all(map(is_number, values[name]))
        return numbers and name.endswith("learning_rate"), numbers, len(values[name])

    return max(values, key=rank)


def sweep_figure(
    study: Study,
    axis: str,
    values: Sequence[Any],
    by_arm: Mapping[str, Sequence[Mapping[str, Any]]],
    every: Sequence[Mapping[str, Any]],
) -> tuple[Figure, bool]:
    """Draw one panel, and say whether numbers stand for values on its axis.

    Args:
        axis: setting on the axis, and its `values`.
        by_arm: arm → its trials in this panel.
        every: trials of all panels, which share one scale.
    """
    figure = Figure(figsize=(4.8, 3.0), layout="constrained")
    axes = figure.subplots()
    ordered = sorted(values) if all(map(is_number, values)) else list(values)
    places = _places(axes, axis, ordered)
    if len(ordered) == 1:
        (place,) = places.values()
        around = (place / 2, 2 * place) if axes.get_xscale() == "log" else (place - 1, place + 1)
        axes.set_xlim(*around)
    for arm, trials in by_arm.items():
        style = arm_style(study.arms, arm)
        points = [(places[setting_value(trial["settings"][axis])], trial) for trial in trials]
        points.sort(key=lambda point: point[0])
        finished = [(x, t["bits_per_byte"]) for x, t in points if t["state"] == "finished"]
        xs, losses = [x for x, _ in finished], [loss for _, loss in finished]
        axes.plot(xs, losses, linewidth=1.4, markersize=4, **style)
        for x, trial in points:
            if trial["chosen"]:
                axes.scatter(
                    [x],
                    [trial["bits_per_byte"]],
                    s=130,
                    linewidths=1.4,
                    zorder=3,
                    facecolors="none",
                    edgecolors=style["color"],
                )
        diverged = [x for x, trial in points if trial["state"] == "diverged"]
        axes.plot(
            diverged,
            [0.97 - 0.06 * list(by_arm).index(arm)] * len(diverged),
            "x",
            color=style["color"],
            transform=axes.get_xaxis_transform(),
            clip_on=False,
        )
    losses = [trial["bits_per_byte"] for trial in every if trial["state"] == "finished"]
    if losses:
        low, high = min(losses), max(losses)
        room = 0.08 * (high - low) or 0.01
        axes.set_ylim(low - room, high + (3 if len(losses) < len(every) else 1) * room)
    axes.set_xlabel(axis)
    axes.set_ylabel("bits per byte")
    ticks = partial(_ticks, axes, [places[setting_value(value)] for value in ordered])
    numbers = not all(map(is_number, values))
    names = [setting_value(value) for value in ordered]
    return figure, labels.fitting(axes, names, ticks, within=False, numbers=numbers)


def _places(axes: Axes, axis: str, ordered: Sequence[Any]) -> dict[str, float]:
    """Return where values stand; numbers by their size, others side by side."""
    if not all(map(is_number, ordered)):
        return {setting_value(value): float(place) for place, value in enumerate(ordered)}
    low, high = float(ordered[0]), float(ordered[-1])
    if low > 0 and (axis.endswith("learning_rate") or high / low >= _SPAN):
        axes.set_xscale("log")
    return {setting_value(value): float(value) for value in ordered}


def _ticks(axes: Axes, places: Sequence[float], names: Sequence[str]) -> list[Text]:
    axes.set_xticks(places, names)
    axes.set_xticks([], minor=True)
    return axes.get_xticklabels()
