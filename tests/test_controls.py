"""The positive controls, in small: each goes the way that it must, and one that did not is told."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def controls():
    spec = importlib.util.spec_from_file_location("controls", ROOT / "scripts" / "controls.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["controls"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def measured(controls):
    """(model, optimizer) → its control and what two stages of one seed came to."""
    small = {}
    for control in controls.CONTROLS:
        if control.optimizer in ("L-BFGS", "Adam, carried over", "AdamW"):
            outcome = controls.measure(control, seed=0, stages=2)
            small[control.name, control.optimizer] = control, outcome
    return small


def test_a_local_function_keeps_old_peaks(measured):
    _, outcome = measured["KAN [1, 1]", "L-BFGS"]
    assert outcome.learned < 1e-4
    assert outcome.times < 1.1
    assert outcome.untouched == 0


def test_from_a_random_start_only_the_borders_of_regions_change(controls):
    """Functions reach three cells of 0.01 over a border, so that inside nothing may change."""
    (control,) = [each for each in controls.CONTROLS if "random start" in each.name]
    task, seed = control.task, 0
    model = controls._built(control, seed)

    def errors() -> tuple[torch.Tensor, torch.Tensor]:
        x = task.unseen(0)
        with torch.no_grad():
            error = (model(x) - task.target(x)).abs()
        inside = (x - task.centres[0][0]).abs() < task.half_width - 0.03
        return error[inside], error[~inside]

    controls._train(control, model, control.start(model), task.seen(0, seed))
    inside, border = errors()
    controls._train(control, model, control.start(model), task.seen(1, seed))
    later_inside, later_border = errors()
    torch.testing.assert_close(later_inside, inside, rtol=0, atol=0)
    assert later_border.square().mean() > border.square().mean()


def test_a_global_function_beside_it_loses_them(measured):
    _, outcome = measured["KAN [1, 1] + SiLU", "L-BFGS"]
    assert outcome.times > 10


def test_an_mlp_learns_each_peak_and_loses_it(measured):
    for name in ("MLP [1, 67, 1]", "MLP [2, 86, 1]"):
        _, outcome = measured[name, "L-BFGS"]
        assert outcome.times > 10
        assert outcome.learned < 0.03


def test_two_layers_lose_what_they_could_have_held(measured):
    _, outcome = measured["KAN [2, 5, 1]", "L-BFGS"]
    assert outcome.times > 10
    assert np.sqrt(outcome.joint).max() < 0.01 < outcome.final


def test_momentum_and_decay_move_what_has_no_gradient(measured):
    control, decayed = measured["KAN [1, 1]", "AdamW"]
    # Each update takes learning rate × decay of a coefficient, and the largest is about 1.2.
    shrunk = 1 - (1 - control.learning_rate * 0.01) ** control.updates
    assert decayed.untouched == pytest.approx(1.2 * shrunk, rel=0.3)
    _, carried = measured["KAN [1, 1]", "Adam, carried over"]
    assert carried.untouched > 1e-3


def test_everything_that_is_expected_of_two_stages_holds(controls, measured):
    assert [controls.Row(control, [outcome]).faults for control, outcome in measured.values()] == [
        []
    ] * len(measured)


def test_models_that_are_compared_are_of_equal_size(controls):
    def parameters(model: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in model.parameters())

    sizes = {control.name: parameters(control.build()) for control in controls.CONTROLS}
    assert sizes == {
        "KAN [1, 1]": 203,
        "KAN [1, 1], random start": 203,
        "KAN [1, 1] + SiLU": 204,
        "MLP [1, 67, 1]": 202,
        "KAN [2, 5, 1]": 345,
        "MLP [2, 86, 1]": 345,
    }


def test_growth_by_hand(controls):
    # Squared errors of old regions: 4 and 16 just learned, 25 and 75 in the end.
    outcome = controls.Outcome([[4, 90, 9], [5, 16, 9], [25, 75, 1]], [1, 1, 1], None)
    assert outcome.learned == pytest.approx(np.sqrt(10))
    assert outcome.final == pytest.approx(np.sqrt(50))
    assert outcome.times == pytest.approx(np.sqrt(5))


@pytest.mark.parametrize(
    ("name", "losses", "untouched", "expected"),
    [
        ("KAN [1, 1]", [[1e-6, 0.1], [1e-6, 1e-6]], 0.0, None),
        ("KAN [1, 1]", [[1e-6, 0.1], [1.3e-6, 1e-6]], 0.0, "lost what it should keep"),
        ("KAN [1, 1]", [[0.05, 0.1], [0.05, 0.05]], 0.0, "did not learn"),
        ("KAN [1, 1]", [[1e-6, 0.1], [1e-6, 1e-6]], 1e-9, "moved coefficients"),
        ("KAN [2, 5, 1]", [[1e-6, 0.1], [9e-5, 1e-6]], None, "kept what it should lose"),
        ("KAN [2, 5, 1]", [[1e-6, 0.1], [1.1e-4, 1e-6]], None, None),
    ],
)
def test_what_is_not_as_expected_is_said(controls, name, losses, untouched, expected):
    control = next(each for each in controls.CONTROLS if each.name == name)
    faults = controls.Row(control, [controls.Outcome(losses, [1, 1], untouched)]).faults
    assert bool(faults) == (expected is not None)
    assert all(expected in fault for fault in faults)


def test_the_page_and_its_numbers_are_written_and_a_fault_is_the_exit_code(
    controls, monkeypatch, tmp_path, capsys
):
    kept = replace(controls.CONTROLS[0], updates=30)
    wrong = replace(kept, name="KAN that should forget", expected="lost")
    monkeypatch.setattr(controls, "CONTROLS", (kept, wrong))
    page = tmp_path / "page.md"
    options = ["--seeds", "0", "1", "--stages", "2", "--jobs", "1", "--output", str(page)]
    assert controls.main(options) == 1
    assert "KAN that should forget, L-BFGS: kept what it should lose" in capsys.readouterr().err
    assert "2 controls, 1 not as expected" in page.read_text()
    written = json.loads(page.with_suffix(".json").read_text())
    assert written["seeds"] == [0, 1]
    assert {"commit", "versions", "hardware"} <= written["provenance"].keys()
    errors = np.array(written["controls"][0]["squared_error_by_seed"])
    assert errors.shape == (2, 2, 2)
    assert written["controls"][0]["faults"] == []
