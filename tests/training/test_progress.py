"""What is shown of a run: always its time left, never wider than the terminal."""

import io
import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from kanlm.training import progress
from kanlm.training.progress import Display, Pace, Task, figures, line, time_left

FIGURES = figures({"loss": 123456.789, "bits_per_byte": 98765.4, "tokens_per_second": 1.2e9})


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize("name", ["words", "kan/seed-0/stage-1-code", "an-arm-of-a-name" * 9])
@pytest.mark.parametrize("total", [12, 10**12])
def test_count_and_time_left_are_whole_however_long_the_rest(width: int, name: str, total: int):
    task = Task(name, total, total - 1, FIGURES, left=400_000.0)
    shown = line(task, width)
    assert cell_len(shown) <= width
    assert f"{total - 1:,}/{total:,}" in shown
    assert "4 d 15 h left" in shown
    # A figure is there or not.
    assert all(figure in shown or figure.split()[0] not in shown.split() for figure in FIGURES)


def test_at_80_columns_a_run_shows_all_of_it():
    figure = figures({"loss": 2.345, "bits_per_byte": 1.771, "tokens_per_second": 12_345.0})
    task = Task("kan/seed-0/stage-1-code", 10_000, 1_234, figure[:2], left=7_380.0)
    shown = line(task, 80)
    assert "kan/seed-0/stage-1-code" in shown
    assert "1,234/10,000, 2 h 3 min left, loss 2.345 nats" in shown
    wide = line(Task("code", 650, 65, figure, left=240.0), 100)
    assert wide == f"code {'━' * 2}{'─' * 22}" + wide[wide.index(" 65/650") :]
    assert wide.endswith("65/650, 4 min left, loss 2.345 nats, 1.771 bits/byte, 12,345 tokens/s")


@given(
    st.text(st.characters(codec="ascii", exclude_categories=["C"]), max_size=60),
    st.integers(0, 10**15),
    st.integers(80, 200),
    st.one_of(st.none(), st.floats(0, 1e10)),
)
def test_no_line_is_wider_than_the_terminal(name: str, total: int, width: int, left: float | None):
    assert cell_len(line(Task(name, total, total / 2, FIGURES, left=left), width)) <= width


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (None, "time left unknown"),
        (0.0, "0 s left"),
        (89.4, "89 s left"),
        (90.0, "2 min left"),
        (3600.0, "1 h left"),
        (3599.0, "60 min left"),
        (7380.0, "2 h 3 min left"),
        (86400.0 * 3, "3 d left"),
        (86399.0, "24 h left"),
    ],
)
def test_time_left_is_said_in_at_most_two_units(seconds: float | None, said: str):
    assert time_left(seconds) == said


def test_the_time_left_counts_what_comes_between_updates():
    pace = Pace(None)
    coming = {"update": 10, "validation": 2, "checkpoint": 1}
    assert pace.seconds_left(coming) is None
    # Within the first update it is known from its share.
    assert pace.seconds_left(coming, begun=40.0, share=0.5) == pytest.approx(10 * 80 - 40)
    pace.add("update", 100.0)
    pace.add("update", 50.0)
    pace.add("validation", 30.0)
    assert pace.seconds_left(coming) == pytest.approx(10 * 75 + 2 * 30)
    assert pace.seconds_left(coming, begun=60.0, share=0.2) == pytest.approx(9.8 * 75 + 2 * 30)


def test_a_resumed_run_knows_its_pace_before_its_first_update():
    assert Pace(7.0).seconds_left({"update": 3, "validation": 1}) == pytest.approx(21.0)


def test_the_time_left_goes_down_between_updates(monkeypatch: pytest.MonkeyPatch):
    now = time.monotonic()
    task = Task("words", 10, 1, left=100.0, since=now)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now + 40)
    assert task.seconds_left() == pytest.approx(60)


def test_a_log_gets_a_line_a_minute(monkeypatch: pytest.MonkeyPatch):
    clock = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    out = io.StringIO()
    with Display(Console(file=out, width=80)) as display:
        task = display.add("words", 100)
        task.figures = FIGURES
        for step in range(100):
            clock[0] += 10
            display.update(task, step + 1, 10.0 * (99 - step))
    lines = out.getvalue().splitlines()
    counts = [int(each.split()[1].split("/")[0]) for each in lines]
    assert counts[0] == 1
    assert counts[-1] == 100
    assert all(after - before == 6 for before, after in pairwise(counts[:-1]))
    assert all("left" in each and "━" not in each for each in lines)


def test_a_terminal_shows_every_run_and_the_whole_at_80_columns():
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=True)
    with Display(console) as display:
        for arm in ("kan", "swiglu"):
            display.add(f"{arm}/trials/optimizer.learning_rate=0.001,optimizer.weight_decay=0.1", 9)
        display.whole = Task("all runs", 18, 7, left=1200.0)
        text = display._text()
    rows = text.plain.splitlines()
    assert len(rows) == 3
    assert all(cell_len(row) <= 80 and "left" in row for row in rows)
    assert rows[-1].endswith("7/18, 20 min left")
