"""Labels of figures cannot overlap, whatever names they have and however many they are."""

import itertools
from typing import Any

import matplotlib as mpl
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.text import Text

from kanlm.reporting import labels
from kanlm.reporting.figures import STYLE, curves_figure, matrix_figure
from kanlm.reporting.study import RunLog, Study
from kanlm.reporting.sweep_figure import axis_setting, sweep_figure

NAMES = st.lists(
    st.text("abcdefghijklmnopqrstuvwxyzW-_. 0123456789é", min_size=1, max_size=60),
    min_size=1,
    max_size=12,
    unique=True,
)
LONG = "medical-abstracts-1990-2004-deduplicated-and-filtered"


def study_of(domains: list[str], steps: list[int]) -> Study:
    """A study of one arm and a stage a domain, with as many steps."""
    n = len(domains)
    matrix = [[12.345 - stage - j for j in range(n)] for stage in range(n)]
    arm: dict[str, Any] = {"bits_per_byte": matrix, "seeds": [0]}
    runs = []
    for stage, (domain, count) in enumerate(zip(domains, steps, strict=False)):
        values = {"step": count, "bits_per_byte": 2.0 + stage, "domain": domain}
        lines = {"train": [{**values, "step": 1}], "validation": [values], "sample": []}
        runs.append(RunLog("kan", 0, stage, domain, lines, ""))
    return Study("study", {"domains": domains, "arms": {"kan": arm}}, runs)


def overlaps(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of texts of a figure that lie over one another, of those that are drawn."""
    figure.draw_without_rendering()
    found = []
    for axes in figure.axes:
        frame = axes.get_window_extent().padded(1)
        # Ticks beyond the limits have labels, too, which are not drawn.
        x_ticks = [t for t in axes.get_xticklabels() if frame.x0 <= middle(t)[0] <= frame.x1]
        y_ticks = [t for t in axes.get_yticklabels() if frame.y0 <= middle(t)[1] <= frame.y1]
        titles = [axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label]  # pyright: ignore
        texts = [t for t in (*axes.texts, *titles, *x_ticks, *y_ticks) if t.get_text().strip()]
        boxes = [text.get_window_extent() for text in texts]
        found += [
            (texts[i].get_text(), texts[j].get_text())
            for i, j in itertools.combinations(range(len(texts)), 2)
            if boxes[i].overlaps(boxes[j])
        ]
    return found


def middle(text: Text) -> tuple[float, float]:
    box = text.get_window_extent()
    return (box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2


@given(NAMES, st.lists(st.integers(1, 5000), min_size=12, max_size=12))
@example([LONG, f"{LONG}-2"], [100] * 12)
@example([f"{LONG}-{i}" for i in range(12)], [5000, *[1] * 11])
@settings(max_examples=12)
def test_stages_of_a_curve(domains: list[str], steps: list[int]) -> None:
    study = study_of(domains, steps)
    with mpl.rc_context(STYLE):
        figure, numbered = curves_figure(study, domains[0])
        assert overlaps(figure) == []
    said = {text.get_text() for text in figure.axes[0].texts}
    if not numbered and len(domains) > 1:
        assert said == {f"trained on {domain}" for domain in domains}


@given(NAMES)
@example([LONG, f"{LONG}-2", "law"])
@example([f"{LONG}-{i}" for i in range(12)])
@example([f"name-of-{i:06d}" for i in range(12)])
@settings(max_examples=8)
def test_rows_and_columns_of_a_heat_map(domains: list[str]) -> None:
    study = study_of(domains, [1] * 12)
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        figure, numbered = matrix_figure(study, "kan")
        assert overlaps(figure) == []
    for axes in figure.axes:
        names = [label.get_text() for label in axes.get_xticklabels()]
        assert names == ([str(n) for n in range(len(domains))] if numbered else domains)
        # What is drawn keeps its room beside long names.
        assert axes.get_window_extent().width > 30 * len(domains)


@given(
    st.lists(st.floats(1e-6, 10), min_size=1, max_size=20, unique=True)
    | st.lists(st.text("abcW{}", min_size=1, max_size=40), min_size=1, max_size=12, unique=True)
)
@example([1e-6])
@example(["a"])
@settings(max_examples=12)
@pytest.mark.filterwarnings("error")
def test_values_of_a_sweep(values: list[Any]) -> None:
    name = "optimizer.learning_rate" if isinstance(values[0], float) else "schedule.kind"
    trials = [
        {
            "settings": {name: value},
            "state": "finished" if i else "diverged",
            "bits_per_byte": 2.0 + i if i else None,
            "chosen": i == 1,
        }
        for i, value in enumerate(values)
    ]
    assert axis_setting({name: values}) == name
    with mpl.rc_context(STYLE):
        figure, _ = sweep_figure(study_of(["a"], [1]), name, values, {"kan": trials}, trials)
        assert overlaps(figure) == []


def test_names_are_written_out_where_they_fit_and_numbered_where_not() -> None:
    with mpl.rc_context(STYLE):
        for domains, numbered in ((["prose", "code"], False), ([LONG, f"{LONG}-2", "law"], True)):
            study = study_of(domains, [600, 300, 300])
            assert curves_figure(study, domains[0])[1] is numbered
            assert matrix_figure(study, "kan")[1] is numbered
    assert labels.key([LONG, "law"]) == f"0: {LONG}, 1: law"
