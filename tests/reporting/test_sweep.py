"""A sweep's tables and figures."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest

from kanlm.reporting.figures import PALETTE, STYLE
from kanlm.reporting.format import setting_value, short_names
from kanlm.reporting.notes import all_notes
from kanlm.reporting.study import Study, read_study
from kanlm.reporting.sweep_figure import axis_setting, sweep_figure, sweep_pictures
from kanlm.reporting.sweep_table import sweep_tables
from kanlm.reporting.table import print_results, quality_table

RATE, DECAY = "optimizer.learning_rate", "optimizer.weight_decay"
LOSSES = {0.001: 2.4, 0.003: 2.2, 0.01: None}


@pytest.fixture
def swept(study_folder: Path, sweep_maker: Callable[..., dict[str, Any]]) -> Study:
    path = study_folder / "results.json"
    results = json.loads(path.read_text())
    results["arms"]["kan"]["sweep"] = sweep_maker(LOSSES)
    results["arms"]["swiglu"]["sweep"] = sweep_maker({**LOSSES, 0.001: 2.1})
    results["arms"]["gelu"]["sweep"] = sweep_maker({0.1: 3.0, 0.3: 2.9, 1.0: 2.8})
    path.write_text(json.dumps(results))
    return read_study(study_folder)


def test_arms_of_one_grid_stand_side_by_side_and_others_alone(swept: Study) -> None:
    shared, alone = sweep_tables(swept.results)
    assert shared.columns == ["learning_rate", "kan", "swiglu"]
    assert shared.rows == [
        ["0.001", "2.400", "▸ 2.100"],
        ["0.003", "▸ 2.200", "2.200"],
        ["0.01", "diverged", "diverged"],
    ]
    assert shared.footnotes == [
        "swiglu: learning_rate 0.001 is the smallest of its grid: better ones may lie beyond it"
    ]
    assert "of gelu" in alone.title
    assert alone.columns == ["learning_rate", "gelu"]
    assert all(
        "validation split" in table.title and "Seed 0" in table.note for table in (shared, alone)
    )


def test_a_choice_at_the_edge_is_marked_beside_the_figure(swept: Study) -> None:
    table = quality_table(swept.results)
    marks = dict(zip([row[0] for row in table.rows], [row[2] for row in table.rows], strict=True))
    assert marks == {"kan": "", "swiglu": "[1]", "gelu": "[2]", "bigram": "", "xz": ""}


def test_figures_of_the_split_that_was_chosen_on_say_so(swept: Study) -> None:
    def said() -> bool:
        return any("this very validation split" in note["note"] for note in all_notes(results))

    results = swept.results
    assert not said()
    for record in results["records"]:
        record["split"] = "validation"
    assert said()


def test_trials_that_the_grid_has_no_more_are_counted(swept: Study) -> None:
    swept.results["arms"]["kan"]["sweep"]["other_trials"] = 2
    notes = [note["note"] for note in all_notes(swept.results) if note["arm"] == "kan"]
    assert notes == ["2 trials in its folder are not of the grid and had no part in the choice"]


def test_the_terminal_shows_the_trials(
    swept: Study, study_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    print_results(study_folder / "results.json")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["0.003", "▸", "2.200", "2.200"] in lines
    assert ["0.01", "diverged", "diverged"] in lines


def two_settings(sweep: dict[str, Any]) -> dict[str, Any]:
    trials = [
        {**trial, "settings": {**trial["settings"], DECAY: decay}, "chosen": False}
        for trial in sweep["trials"]
        for decay in (0.0, 0.1)
    ]
    trials[2]["chosen"] = True
    return {**sweep, "trials": trials}


def test_a_second_setting_has_a_panel_for_each_value(swept: Study) -> None:
    for arm in swept.results["arms"].values():
        arm["sweep"] = two_settings(arm["sweep"])
    assert [p.title for p in sweep_pictures(swept)] == [
        "Loss by learning_rate, weight_decay 0",
        "Loss by learning_rate, weight_decay 0.1",
    ]
    assert sweep_tables(swept.results)[0].rows[2] == ["0.003", "0", "▸ 2.200", "▸ 2.200"]
    assert sweep_tables(swept.results)[0].names == 2


def test_losses_stand_over_their_rates_on_a_logarithm(swept: Study) -> None:
    trials = swept.results["arms"]["kan"]["sweep"]["trials"]
    with mpl.rc_context(STYLE):
        figure, _ = sweep_figure(swept, RATE, list(LOSSES), {"kan": trials}, trials)
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    losses, diverged = axes.lines
    assert np.asarray(losses.get_xydata()).tolist() == [[0.001, 2.4], [0.003, 2.2]]
    assert losses.get_color() == PALETTE[0]
    assert np.asarray(diverged.get_xdata()).tolist() == [0.01]
    (ring,) = axes.collections
    assert ring.get_offsets().tolist() == [[0.003, 2.2]]  # pyright: ignore


def test_the_axis_is_the_rate_or_what_has_most_numbers() -> None:
    rates = [0.1, 0.2]
    assert axis_setting({DECAY: [0.0, 0.1, 0.2], RATE: rates}) == RATE
    assert axis_setting({"schedule.kind": ["a", "b", "c"], DECAY: rates}) == DECAY
    assert axis_setting({"schedule.kind": ["a", "b"]}) == "schedule.kind"


def test_settings_have_short_names_and_values_are_told_apart() -> None:
    assert short_names([RATE, DECAY]) == {RATE: "learning_rate", DECAY: "weight_decay"}
    twice = ["a.kind", "b.kind"]
    assert short_names(twice) == {"a.kind": "a.kind", "b.kind": "b.kind"}
    values = [0.003, 0.0030000001, 3, "cosine", True, None, {"kind": "kan"}]
    assert [setting_value(value) for value in values] == [
        *("0.003", "0.0030000001", "3", "cosine", "true", "null", '{"kind": "kan"}'),
    ]
