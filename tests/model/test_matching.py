"""Solved widths, checked by building the blocks and counting their parameters."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kanlm.model.feed_forward import make_feed_forward
from kanlm.model.matching import resolve_feed_forward, solve_hidden, twin
from kanlm.model.settings import ModelSettings

specs = st.one_of(
    st.sampled_from([{"kind": "gelu"}, {"kind": "relu2"}, {"kind": "swiglu"}]),
    st.builds(
        lambda grid_size, degree, base: {
            "kind": "kan",
            "base": base,
            "basis": {"kind": "bspline", "grid_size": grid_size, "degree": degree},
        },
        st.integers(1, 9),
        st.integers(1, 3),
        st.sampled_from(["silu", None]),
    ),
)
widths = st.sampled_from([8, 24, 64, 132])


def cost(spec: dict, d_model: int, of: str) -> int:
    block = make_feed_forward(spec, d_model, 1.0)
    return block.flops_per_token if of == "flops" else sum(p.numel() for p in block.parameters())


@settings(deadline=None, max_examples=50)
@given(specs, widths, st.floats(2.0, 20.0), st.sampled_from(["parameters", "flops"]))
def test_solved_cost_is_within_a_percent_or_a_unit_of_width(spec, d_model, ratio, of) -> None:
    unit = cost({**spec, "hidden": 2}, d_model, of) - cost({**spec, "hidden": 1}, d_model, of)
    target = int(ratio * d_model**2) + unit
    hidden = solve_hidden(spec, d_model, **{of: target})
    got = cost({**spec, "hidden": hidden}, d_model, of)
    assert abs(got - target) <= max(0.01 * target, unit)
    # And no neighbour is nearer.
    for other in (hidden - 1, hidden + 1):
        if other >= 1:
            assert abs(cost({**spec, "hidden": other}, d_model, of) - target) >= abs(got - target)


@settings(deadline=None, max_examples=25)
@given(
    st.lists(specs, min_size=1, max_size=3), specs, widths, st.sampled_from(["parameters", "flops"])
)
def test_twins_cost_the_same_in_total(kinds, other, d_model, of) -> None:
    original = resolve_feed_forward(
        ModelSettings(d_model=d_model, n_layers=len(kinds), n_heads=2, feed_forward=kinds)
    )
    derived = twin(original, other, of)
    assert dataclasses.replace(derived, feed_forward=original.feed_forward) == original
    totals = [
        sum(cost(spec, d_model, of) for spec in settings.feed_forward_by_layer)
        for settings in (original, derived)
    ]
    unit = cost({**other, "hidden": 2}, d_model, of) - cost({**other, "hidden": 1}, d_model, of)
    assert abs(totals[0] - totals[1]) <= max(0.01 * totals[0], unit * len(kinds))


def test_open_widths_hold_eight_square_d_model() -> None:
    stated = {"kind": "gelu", "hidden": 7}
    resolved = resolve_feed_forward(
        ModelSettings(n_layers=3, feed_forward=[{"kind": "gelu"}, {"kind": "kan"}, stated])
    )
    first, second, third = resolved.feed_forward_by_layer
    assert first == {"kind": "gelu", "hidden": 4 * 128}
    assert third == stated
    assert cost(second, 128, "parameters") == pytest.approx(8 * 128**2, rel=0.01)


def test_a_single_kind_stays_a_single_kind() -> None:
    assert resolve_feed_forward(ModelSettings()).feed_forward == {
        "kind": "kan",
        "hidden": 64,
        "base": "silu",
        "basis": {
            "kind": "bspline",
            "grid_size": 6,
            "degree": 1,
            "grid_range": [-3.0, 3.0],
            "equal_cells": True,
            "per_channel": False,
        },
    }


def test_too_small_a_target_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be as small as 10 parameters at d_model = 64"):
        solve_hidden({"kind": "kan"}, 64, parameters=10)


@pytest.mark.parametrize("costs", [{}, {"parameters": 100, "flops": 100}])
def test_exactly_one_cost_is_asked_for(costs: dict) -> None:
    with pytest.raises(ValueError, match="either parameters or flops"):
        solve_hidden({"kind": "gelu"}, 8, **costs)
