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
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure

from kanlm.reporting.numbers import fixed, signed
from kanlm.reporting.study import Study

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
#: One fewer than colours, so that their pairs repeat after 30 arms.
MARKERS = ("o", "s", "^", "D", "v")

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
#: Share of training losses that an axis leaves above it: the first steps' fall.
_CUT = 0.04


@dataclass(frozen=True)
class Picture:
    """A figure with what a reader needs beside it."""

    title: str
    svg: str
    #: Arm that the whole figure is about, if one.
    arm: str | None = None


def arm_style(arms: Sequence[str], arm: str) -> dict[str, Any]:
    """Colour and marker of an arm."""
    index = list(arms).index(arm)
    return {"color": PALETTE[index % len(PALETTE)], "marker": MARKERS[index % len(MARKERS)]}


def learning_curves(study: Study) -> list[Picture]:
    """Training loss, and validation bits per byte of every domain, over all stages' steps."""
    pictures = []
    if any(run.lines["train"] for run in study.runs):
        pictures.append(_curves(study, None, "Training loss", "nats a token"))
    validated = {line["domain"] for run in study.runs for line in run.lines["validation"]}
    return pictures + [
        _curves(study, domain, f"Validation on {domain}", "bits per byte")
        for domain in study.domains
        if domain in validated
    ]


def loss_matrices(study: Study) -> list[Picture]:
    """One heat map an arm: bits per byte by stage and domain, and the change since stage 0."""
    if len(study.stages) < 2:
        return []
    matrices = {arm: _matrix(study.results["arms"][arm]["bits_per_byte"]) for arm in study.arms}
    stacked = np.stack(list(matrices.values()))
    if np.isnan(stacked[:, 0]).all():
        return []
    changes = stacked - stacked[:, :1]
    largest = max(float(np.nanmax(np.abs(changes))), 1e-9)
    absolute = Normalize(float(np.nanmin(stacked)), float(np.nanmax(stacked)))
    relative = TwoSlopeNorm(0, -largest, largest)
    pictures = []
    for number, (arm, matrix) in enumerate(matrices.items()):
        with mpl.rc_context({**STYLE, "axes.grid": False}):
            figure = Figure(figsize=(4.8, 0.75 + 0.42 * len(matrix)), layout="constrained")
            left, right = figure.subplots(1, 2)
            _heat_map(left, matrix, "Purples", absolute, fixed, study)
            left.set_title("bits per byte", loc="left")
            _heat_map(right, matrix - matrix[0], "RdBu_r", relative, signed, study)
            right.set_title("change since pretraining", loc="left")
            right.set_yticks([])
            pictures.append(
                Picture(f"Loss by stage and domain: {arm}", _svg(figure, f"matrix-{number}"), arm)
            )
    return pictures


def forgetting_and_gain(study: Study) -> list[Picture]:
    """Forgetting against learning gain, one small point a seed and a large one for the mean."""
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
            axes.annotate(
                arm,
                (float(np.mean(gains)), float(np.mean(losses))),
                xytext=(0, 7),
                textcoords="offset points",
                ha="center",
                va="bottom",
            )
        axes.set_xlabel("learning gain, bits per byte (right is better)")
        axes.set_ylabel("forgetting, bits per byte (low is better)")
        axes.margins(0.18)
        return [Picture("Forgetting against learning gain", _svg(figure, "forgetting"))]


# Curves


def _curves(study: Study, domain: str | None, title: str, unit: str) -> Picture:
    """One panel; `domain` None is the training loss."""
    offsets = _stage_offsets(study)
    shown: list[float] = []
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.8, 3.0), layout="constrained")
        axes = figure.subplots()
        for arm in study.arms:
            curves = list(_seed_curves(study, arm, domain, offsets))
            style = arm_style(study.arms, arm)
            shown += [value for _, values in curves for value in values]
            if len(curves) > 1:
                for steps, values in curves:
                    axes.plot(steps, values, color=style["color"], linewidth=0.6, alpha=0.5)
            steps, values = _mean_curve(curves)
            if len(steps) > 24:
                style["marker"] = ""
            axes.plot(steps, values, linewidth=1.7, markersize=4, **style)
        _mark_stages(axes, study, offsets)
        if domain is None:
            _cut_first_steps(axes, shown)
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        number = "training" if domain is None else study.domains.index(domain)
        return Picture(title, _svg(figure, f"curves-{number}"))


def _seed_curves(
    study: Study, arm: str, domain: str | None, offsets: Sequence[int]
) -> Iterator[tuple[list[int], list[float]]]:
    """(steps over all stages, values) of every seed."""
    for seed in study.results["arms"][arm]["seeds"]:
        steps: list[int] = []
        values: list[float] = []
        for run in study.arm_runs(arm, seed):
            if domain is None:
                points = [(line["step"], line["loss"]) for line in run.lines["train"]]
            else:
                points = [
                    (line["step"], line["bits_per_byte"])
                    for line in run.lines["validation"]
                    if line["domain"] == domain
                ]
            steps += [offsets[run.stage] + step for step, _ in points]
            values += [value for _, value in points]
        if steps:
            yield steps, values


def _mean_curve(
    curves: Sequence[tuple[list[int], list[float]]],
) -> tuple[list[int], list[float]]:
    """Mean over seeds at the steps that all of them have."""
    if not curves:
        return [], []
    by_step = [dict(zip(*curve, strict=True)) for curve in curves]
    steps = [step for step in by_step[0] if all(step in curve for curve in by_step)]
    return steps, [float(np.mean([curve[step] for curve in by_step])) for step in steps]


def _stage_offsets(study: Study) -> list[int]:
    """Steps taken before each stage, and after the last; none where a log is gone."""
    offsets = [0]
    stages = max(len(study.stages), 1 + max(run.stage for run in study.runs))
    for stage in range(stages):
        longest = max((run.steps for run in study.runs if run.stage == stage), default=0)
        offsets.append(offsets[-1] + longest)
    return offsets


def _mark_stages(axes: Axes, study: Study, offsets: Sequence[int]) -> None:
    if len(study.stages) < 2:
        return
    for stage, domain in enumerate(study.stages):
        if stage:
            axes.axvline(offsets[stage], color="#808080", linewidth=0.8, linestyle=(0, (4, 3)))
        middle = (offsets[stage] + offsets[stage + 1]) / 2
        axes.text(
            middle,
            1.01,
            f"trained on {domain}",
            transform=axes.get_xaxis_transform(),
            ha="center",
            va="bottom",
            fontsize=8,
        )


def _cut_first_steps(axes: Axes, values: Sequence[float]) -> None:
    """End the loss axis below the fall of the first steps, which would flatten the rest."""
    known = [value for value in values if np.isfinite(value)]
    if not known:
        return
    low, high = float(np.min(known)), float(np.quantile(known, 1 - _CUT))
    if high > low:
        axes.set_ylim(low - 0.04 * (high - low), high + 0.04 * (high - low))


# Heat maps


def _heat_map(
    axes: Axes, matrix: np.ndarray, colours: str, norm: Normalize, write: Any, study: Study
) -> None:
    stages, domains = matrix.shape
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
    axes.set_xticks(np.arange(domains) + 0.5, study.domains)
    axes.set_yticks(np.arange(stages) + 0.5, [f"after {domain}" for domain in study.stages])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _text_on(background: Any) -> str:
    """Black or white, whichever has more contrast (relative luminance as in WCAG 2)."""
    luminance = np.asarray(background[:3]) ** 2.2 @ (0.2126, 0.7152, 0.0722)
    return "#000000" if luminance > 0.179 else "#ffffff"


def _matrix(rows: Sequence[Sequence[float | None]]) -> np.ndarray:
    return np.array(rows, dtype=float)


def _mean(values: Any) -> float:
    return float(np.mean(np.array(list(values), dtype=float)))


# SVG


def standalone_svg(figure: Figure) -> str:
    """The figure as a file of its own, black on the page's ground."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue().replace(_FOREGROUND, "#000000")


def _svg(figure: Figure, name: str) -> str:
    """The figure as an element for HTML; its ids are made unique on the page by `name`."""
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
