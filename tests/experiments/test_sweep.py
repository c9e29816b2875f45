"""What became of trials, from what they left in their folders."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kanlm.config import Config, from_tree
from kanlm.errors import UserError
from kanlm.experiments import sweep
from kanlm.experiments.sweep import Trial
from kanlm.results.sweep import edges

RATE = "optimizer.learning_rate"


def config_in(folder: Path, **training: Any) -> Config:
    return from_tree({"output_dir": str(folder), "training": {"max_skipped_steps": 3, **training}})


def left_out(*steps: int) -> list[dict[str, Any]]:
    return [{"kind": "unusual", "step": s, "what": "nan", "skipped": True} for s in steps]


def write_log(folder: Path, lines: list[dict[str, Any]]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


TAKEN = {"kind": "train", "step": 4, "bits_per_byte": 2.0}
LEAP = {"kind": "unusual", "step": 5, "what": "a spike", "skipped": False}


@pytest.mark.parametrize(
    ("lines", "diverged"),
    [
        ([TAKEN, *left_out(5, 6, 7)], True),
        (left_out(1, 2, 3), True),
        ([*left_out(5, 6), {**TAKEN, "step": 6}, *left_out(7)], True),
        # As many, but not in a row; fewer; followed by one that was taken; none left out.
        ([TAKEN, *left_out(5, 7, 8)], False),
        ([TAKEN, *left_out(5, 6)], False),
        ([*left_out(1, 2, 3), TAKEN], False),
        ([LEAP, *left_out(6, 7)], False),
        ([], False),
    ],
)
def test_a_run_has_diverged_whose_last_steps_were_all_left_out(lines, diverged, tmp_path):
    write_log(tmp_path, lines)
    assert sweep.has_diverged(config_in(tmp_path)) == diverged
    (tmp_path / "results.json").touch()
    assert not sweep.has_diverged(config_in(tmp_path))


def test_a_run_that_has_not_begun_has_not_diverged(tmp_path):
    assert not sweep.has_diverged(config_in(tmp_path))


def trial(loss: float | None, **settings: Any) -> Trial:
    return Trial(settings, "finished" if loss else "diverged", loss, 9, chosen=False)


@given(st.lists(st.none() | st.floats(0.5, 9.0), min_size=1, max_size=8))
def test_the_trial_of_least_loss_is_chosen_and_none_that_diverged(losses):
    trials = [trial(loss) for loss in losses]
    if losses.count(None) == len(losses):
        with pytest.raises(UserError, match=r"study\.arms\.kan: all \d trials of its grid div"):
            sweep.choose(trials, "kan")
        return
    (chosen,) = [t for t in sweep.choose(trials, "kan") if t.chosen]
    assert chosen.bits_per_byte == min(loss for loss in losses if loss is not None)
    assert chosen == sweep.choose(trials, "kan")[losses.index(chosen.bits_per_byte)]


def edges_of(chosen: Any, values: list[Any], name: str = RATE) -> list[str]:
    rows = [{"settings": {name: value}, "chosen": value == chosen} for value in values]
    return [found["edge"] for found in edges(rows)]


def test_edges_are_the_smallest_and_the_largest_of_what_was_tried():
    rates = [3e-3, 1e-3, 1e-2]
    assert edges_of(1e-3, rates) == ["smallest"]
    assert edges_of(1e-2, rates) == ["largest"]
    assert edges_of(3e-3, rates) == []
    # Nothing lies below 0; one value is no grid; and what is no number has no edge.
    assert edges_of(0.0, [0.0, 0.1], "optimizer.weight_decay") == []
    assert edges_of(1e-3, [1e-3]) == []
    assert edges_of("cosine", ["constant", "cosine"], "schedule.kind") == []
    assert edges_of(True, [True, False], "model.tie_embeddings") == []


def test_a_larger_value_that_diverged_was_tried():
    record = sweep.record(
        sweep.choose([trial(2.5, rate=0.1), trial(2.0, rate=0.3), trial(None, rate=1.0)], "kan"),
        seed=3,
        domain="words",
        others=1,
    )
    assert record["edges"] == []
    assert [row["state"] for row in record["trials"]] == ["finished", "finished", "diverged"]
    assert (record["seed"], record["split"], record["other_trials"]) == (3, "validation", 1)


def test_each_setting_has_its_own_edge():
    rows = [
        {"settings": {"a": a, "b": b}, "chosen": (a, b) == (2, 5)}
        for a in (1, 2, 3)
        for b in (5, 6)
    ]
    assert edges(rows) == [{"setting": "b", "value": 5, "edge": "smallest"}]
