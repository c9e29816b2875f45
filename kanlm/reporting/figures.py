"""Figures as inline SVG that takes the page's text colour.

Text, axes and ticks are drawn in a colour that stands for the page's own and is replaced
by CSS's `currentColor`, so that one figure serves light and dark pages. Arms keep one
colour and one marker through all figures, from a palette that colour-blind readers can
tell apart (Okabe and Ito 2008).
"""

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.text import Text

from kanlm.reporting import labels
from kanlm.reporting.format import fixed, signed
from kanlm.reporting.study import Study

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
#: One fewer than colours, so that their pairs repeat after 30 arms.
MARKERS = ("o", "s", "^", "D", "v")
#: The same as text.
GLYPHS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼"}

#: Drawn where the page's text colour belongs; no other colour may equal it.
_FOREGROUND = "#010203"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "kanlm",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#80808040",
    "grid.linewidth": 0.6,
    "axes.linewidth": 0.7,
    "text.color": _FOREGROUND,
    "axes.edgecolor": _FOREGROUND,
    "axes.labelcolor": _FOREGROUND,
    "xtick.color": _FOREGROUND,
    "ytick.color": _FOREGROUND,
    # A dollar in an arm's name is a dollar.
    "text.parse_math": False,
}
#: Most characters of a domain's name that a heat map has room for.
_SHORT = 14
#: Inches of a heat map's cell with its figure.
_CELL = 0.62
#: Share of training losses that an axis leaves above it: the first steps' fall.
_CUT = 0.04


@dataclass(frozen=True)
class Picture:
    """A figure with what a reader needs beside it."""

    title: str
    svg: str
    #: Arm that the whole figure is about, if one.
    arm: str | None = None
    #: What numbers in it stand for.
    key: str = ""
    #: Inches that it must not be shown narrower than, for its text to be read.
    width: float = 0.0


def arm_style(arms: Sequence[str], arm: str) -> dict[str, Any]:
    """Return colour and marker of an arm."""
    index = list(arms).index(arm)
    return {"color": PALETTE[index % len(PALETTE)], "marker": MARKERS[index % len(MARKERS)]}


def learning_curves(study: Study) -> list[Picture]:
    """Draw bits per byte over all stages' steps, a picture a domain: validation beside training."""
    trained = {run.domain for run in study.runs if run.lines["train"]}
    validated = {line["domain"] for run in study.runs for line in run.lines["validation"]}
    return [
        _curves(study, domain, number)
        for number, domain in enumerate(study.domains)
        if domain in trained | validated
    ]


def loss_matrices(study: Study) -> list[Picture]:
    """Draw a heat map an arm: bits per byte by stage and domain, and the change since stage 0."""
    if len(study.stages) < 2:
        return []
    pictures = []
    for number, arm in enumerate(study.arms):
        with mpl.rc_context({**STYLE, "axes.grid": False}):
            figure, numbered = matrix_figure(study, arm)
            pictures.append(
                Picture(
                    f"Loss by stage and domain: {arm}",
                    svg_of(figure, f"matrix-{number}"),
                    arm,
                    key=labels.key(study.domains) if numbered else "",
                    width=figure.get_figwidth(),
                )
            )
    return pictures


def matrix_figure(study: Study, arm: str) -> tuple[Figure, bool]:
    """Draw the heat map, and say whether numbers stand for domains in it."""
    matrices = [_matrix(study.results["arms"][name]["bits_per_byte"]) for name in study.arms]
    stacked = np.stack(matrices)
    changes = stacked - stacked[:, :1]
    largest = max(float(np.nanmax(np.abs(changes))), 1e-9)
    absolute = Normalize(float(np.nanmin(stacked)), float(np.nanmax(stacked)))
    relative = TwoSlopeNorm(0, -largest, largest)
    matrix = matrices[study.arms.index(arm)]
    stages, domains = matrix.shape
    named = max(map(len, study.domains)) <= _SHORT
    wide = domains * _CELL + (0.3 + 0.09 * _SHORT if named else 0.8)
    side_by_side = domains <= 2
    tall = 0.75 + 0.42 * stages
    if side_by_side:
        figure = Figure(figsize=(4.8, tall), layout="constrained")
        left, right = figure.subplots(1, 2)
    else:
        figure = Figure(figsize=(max(4.8, wide), 2 * tall), layout="constrained")
        left, right = figure.subplots(2, 1)
    rows = [
        f"after {domain}" if named else f"after {number}"
        for number, domain in enumerate(study.stages)
    ]
    _heat_map(left, matrix, "Purples", absolute, fixed, rows)
    left.set_title("bits per byte", loc="left")
    _heat_map(right, matrix - matrix[0], "RdBu_r", relative, signed, rows)
    right.set_title("change since pretraining", loc="left")
    if side_by_side:
        right.set_yticks([])
    # Where one of both has no room for names, both have numbers.
    numbered = not named
    for axes in (left, right, left):
        names = [str(number) for number in range(domains)] if numbered else study.domains
        numbered |= labels.fitting(axes, names, partial(_columns, axes), within=False)
    return figure, numbered


def _columns(axes: Axes, names: Sequence[str]) -> list[Text]:
    """Write the names of a heat map's columns below it."""
    axes.set_xticks(np.arange(len(names)) + 0.5, names)
    return axes.get_xticklabels()


def forgetting_and_gain(study: Study) -> list[Picture]:
    """Draw forgetting against learning gain, a small point a seed and a large one for the mean."""
    if len(study.stages) < 2:
        return []
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.8, 3.4), layout="constrained")
        axes = figure.subplots()
        for arm in study.arms:
            values, style = study.results["arms"][arm], arm_style(study.arms, arm)
            gains = [_mean(seed.values()) for seed in values["learning_gain_by_seed"]]
            losses = [_mean(seed.values()) for seed in values["forgetting_by_seed"]]
            if len(gains) > 1:
                axes.scatter(
                    gains, losses, s=22, alpha=0.6, linewidths=1, **{**style, "facecolors": "none"}
                )
            axes.scatter(np.mean(gains), np.mean(losses), s=70, zorder=3, **style)
        axes.set_xlabel("learning gain, bits per byte (right is better)")
        axes.set_ylabel("forgetting, bits per byte (low is better)")
        axes.margins(0.18)
        return [Picture("Forgetting against learning gain", svg_of(figure, "forgetting"))]


# Curves


def _curves(study: Study, domain: str, number: int) -> Picture:
    with mpl.rc_context(STYLE):
        figure, numbered = curves_figure(study, domain)
        return Picture(
            f"{domain}, bits per byte",
            svg_of(figure, f"curves-{number}"),
            key=labels.key(study.stages) if numbered else "",
        )


def curves_figure(study: Study, domain: str) -> tuple[Figure, bool]:
    """Draw validation, and training in the domain's stage; say if numbers stand for stages."""
    offsets = _stage_offsets(study)
    shown: dict[str, list[float]] = {"train": [], "validation": []}
    figure = Figure(figsize=(4.8, 3.0), layout="constrained")
    axes = figure.subplots()
    for arm in study.arms:
        style = arm_style(study.arms, arm)
        for kind in ("train", "validation"):
            curves = list(_seed_curves(study, arm, domain, kind, offsets))
            shown[kind] += [value for _, values in curves for value in values]
            if kind == "train":
                steps, values = _mean_curve(curves)
                axes.plot(steps, values, color=style["color"], linewidth=0.8, alpha=0.55)
                continue
            if len(curves) > 1:
                for steps, values in curves:
                    axes.plot(steps, values, color=style["color"], linewidth=0.6, alpha=0.5)
            steps, values = _mean_curve(curves)
            marker = style["marker"] if len(steps) <= 24 else ""
            axes.plot(steps, values, linewidth=1.7, markersize=4, **{**style, "marker": marker})
    _cut_first_steps(axes, **shown)
    room = 0.02 * offsets[-1] or 1.0
    axes.set_xlim(-room, offsets[-1] + room)
    axes.set_xlabel("step")
    axes.set_ylabel("bits per byte")
    return figure, _mark_stages(axes, study, offsets)


def _seed_curves(
    study: Study, arm: str, domain: str, kind: str, offsets: Sequence[int]
) -> Iterator[tuple[list[int], list[float]]]:
    """Return (steps over all stages, bits per byte) of every seed, of `train` or `validation`."""
    for seed in study.results["arms"][arm]["seeds"]:
        steps: list[int] = []
        values: list[float] = []
        for run in study.arm_runs(arm, seed):
            points = [
                (line["step"], line["bits_per_byte"])
                for line in run.lines[kind]
                # A training line is of the run's own domain.
                if line.get("domain", run.domain) == domain
            ]
            steps += [offsets[run.stage] + step for step, _ in points]
            values += [value for _, value in points]
        if steps:
            yield steps, values


def _mean_curve(
    curves: Sequence[tuple[list[int], list[float]]],
) -> tuple[list[int], list[float]]:
    """Return mean over seeds at the steps that all of them have."""
    if not curves:
        return [], []
    by_step = [dict(zip(*curve, strict=True)) for curve in curves]
    steps = [step for step in by_step[0] if all(step in curve for curve in by_step)]
    return steps, [float(np.mean([curve[step] for curve in by_step])) for step in steps]


def _stage_offsets(study: Study) -> list[int]:
    """Return steps taken before each stage, and after the last; none where a log is gone."""
    offsets = [0]
    stages = max(len(study.stages), 1 + max(run.stage for run in study.runs))
    for stage in range(stages):
        longest = max((run.steps for run in study.runs if run.stage == stage), default=0)
        offsets.append(offsets[-1] + longest)
    return offsets


def _mark_stages(axes: Axes, study: Study, offsets: Sequence[int]) -> bool:
    """Draw lines between stages, write what each trained on, and say whether by number."""
    if len(study.stages) < 2:
        return False
    for start in offsets[1 : len(study.stages)]:
        axes.axvline(start, color="#808080", linewidth=0.8, linestyle=(0, (4, 3)))

    drawn: list[Text] = []

    def draw(names: list[str]) -> list[Text]:
        while drawn:
            drawn.pop().remove()
        drawn.extend(
            axes.text(
                (offsets[stage] + offsets[stage + 1]) / 2,
                1.01,
                name,
                transform=axes.get_xaxis_transform(),
                ha="center",
                va="bottom",
                fontsize=8,
            )
            for stage, name in enumerate(names)
        )
        return drawn

    written_out = [f"trained on {domain}" for domain in study.stages]
    return labels.fitting(axes, written_out, draw, within=True)


def _cut_first_steps(axes: Axes, train: Sequence[float], validation: Sequence[float]) -> None:
    """End the axis above the largest validation, where the first steps' fall would flatten it.

    Without validations, above all but the first steps.
    """
    trained = [value for value in train if np.isfinite(value)]
    validated = [value for value in validation if np.isfinite(value)]
    if not trained:
        return
    low = min([*trained, *validated])
    high = max(validated) if validated else float(np.quantile(trained, 1 - _CUT))
    if high > low:
        axes.set_ylim(low - 0.04 * (high - low), high + 0.08 * (high - low))


# Heat maps


def _heat_map(
    axes: Axes,
    matrix: np.ndarray,
    colours: str,
    norm: Normalize,
    write: Any,
    rows: Sequence[str],
) -> None:
    cells = axes.pcolormesh(matrix, cmap=colours, norm=norm)
    axes.invert_yaxis()
    for (stage, domain), value in np.ndenumerate(matrix):
        measured = not np.isnan(value)
        axes.text(
            domain + 0.5,
            stage + 0.5,
            write(value if measured else None),
            ha="center",
            va="center",
            color=_text_on(cells.to_rgba(value)) if measured else _FOREGROUND,
        )
    axes.set_yticks(np.arange(len(matrix)) + 0.5, rows)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _text_on(background: Any) -> str:
    """Choose black or white, whichever has more contrast (relative luminance as in WCAG 2)."""
    luminance = np.asarray(background[:3]) ** 2.2 @ (0.2126, 0.7152, 0.0722)
    return "#000000" if luminance > 0.179 else "#ffffff"


def _matrix(rows: Sequence[Sequence[float | None]]) -> np.ndarray:
    return np.array(rows, dtype=float)


def _mean(values: Any) -> float:
    return float(np.mean(np.array(list(values), dtype=float)))


# SVG


def standalone_svg(figure: Figure) -> str:
    """Return the figure as a file of its own, black on the page's ground."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue().replace(_FOREGROUND, "#000000")


def svg_of(figure: Figure, name: str) -> str:
    """Return the figure as an element for HTML; its ids are made unique on the page by `name`."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    return svg.replace(_FOREGROUND, "currentColor")
