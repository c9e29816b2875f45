"""Solved widths, checked by building the blocks and counting their parameters."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kanlm.model.feed_forward import FEED_FORWARDS, make_feed_forward, width_multiple
from kanlm.model.matching import (
    resolve_feed_forward,
    solve_hidden,
    solve_widths,
    total_cost,
    twin,
)
from kanlm.model.settings import ModelSettings

WITH_WIDTH = [kind for kind, factory in FEED_FORWARDS.items() if factory.has_width]
#: One without a width, at two costs.
SINGLE = {"kind": "kan-single"}
SMALLER = {"kind": "kan-single", "basis": {"kind": "hermite", "degree": 2}}

specs = st.one_of(
    st.sampled_from([{"kind": kind} for kind in WITH_WIDTH]),
    st.sampled_from(
        [
            {"kind": "kan-glu", "learned": "value", "base": "silu"},
            {"kind": "spline-mlp", "gate": True},
            {"kind": "kat", "groups": 4},
            {"kind": "lowrank-kan", "rank": 3, "groups": 2},
        ]
    ),
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
widths = st.sampled_from([8, 24, 64, 136])


def cost(spec: dict, d_model: int, of: str) -> int:
    block = make_feed_forward(spec, d_model, 1.0)
    return block.flops_per_token if of == "flops" else sum(p.numel() for p in block.parameters())


def unit_cost(spec: dict, d_model: int, of: str) -> int:
    """What one more unit of width costs, the unit being what the width must be a multiple of."""
    unit = width_multiple(spec)
    one, two = (cost({**spec, "hidden": n * unit}, d_model, of) for n in (1, 2))
    return two - one


@settings(max_examples=30)
@given(specs, widths, st.floats(2.0, 20.0), st.sampled_from(["parameters", "flops"]))
def test_solved_cost_is_within_a_percent_or_a_unit_of_width(spec, d_model, ratio, of) -> None:
    multiple, unit = width_multiple(spec), unit_cost(spec, d_model, of)
    narrowest = cost({**spec, "hidden": multiple}, d_model, of)
    target = int(ratio * d_model**2) + narrowest
    hidden = solve_hidden(spec, d_model, **{of: target})
    assert hidden % multiple == 0
    got = cost({**spec, "hidden": hidden}, d_model, of)
    assert abs(got - target) <= max(0.01 * target, unit)
    # And no neighbour is nearer, but where another width runs faster at nearly that cost.
    aligned = hidden % 2 == 0 and abs(got - target) <= 0.005 * target
    for other in (hidden - multiple, hidden + multiple):
        if other >= 1 and not aligned:
            assert abs(cost({**spec, "hidden": other}, d_model, of) - target) >= abs(got - target)


@pytest.mark.parametrize(
    ("kind", "d_model", "hidden"),
    [
        # 8 d² parameters would need 682.7 and 1365.3.
        ("kan", 512, 680),
        ("swiglu", 512, 1360),
        ("gelu", 512, 2048),
        # Half a percent is less than one unit here.
        ("swiglu", 32, 85),
    ],
)
def test_widths_suit_the_hardware_where_that_costs_little(kind, d_model, hidden) -> None:
    assert solve_hidden({"kind": kind}, d_model, parameters=8 * d_model**2) == hidden


@settings(max_examples=15)
@given(
    st.lists(specs, min_size=1, max_size=3),
    specs,
    st.sampled_from([24, 64, 136]),
    st.sampled_from(["parameters", "flops"]),
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
    unit = unit_cost(other, d_model, of)
    assert abs(totals[0] - totals[1]) <= max(0.01 * totals[0], unit * len(kinds))


@pytest.mark.parametrize("one", FEED_FORWARDS)
def test_any_two_kinds_match_to_a_hundredth_in_either_order(one: str) -> None:
    """To a unit of width where that is more: for experts, each of which is small."""
    original = resolve_feed_forward(
        ModelSettings(d_model=384, n_layers=1, n_heads=2, feed_forward={"kind": one})
    )
    target = cost(original.feed_forward_by_layer[0], 384, "parameters")
    for other in WITH_WIDTH:
        derived = twin(original, {"kind": other})
        got = cost(derived.feed_forward_by_layer[0], 384, "parameters")
        unit = unit_cost({"kind": other}, 384, "parameters")
        assert abs(got - target) <= max(0.01 * target, unit), other


def test_without_a_width_there_is_nothing_to_solve() -> None:
    message = "feed_forward of kind 'kan-single' has no width to solve"
    with pytest.raises(ValueError, match=message):
        solve_hidden(SINGLE, 64, parameters=10_000)
    with pytest.raises(ValueError, match=message):
        twin(ModelSettings(feed_forward={"kind": "gelu"}), SINGLE)
    assert "hidden" not in resolve_feed_forward(ModelSettings(feed_forward=SINGLE)).feed_forward
    assert cost(SMALLER, 64, "parameters") < cost(SINGLE, 64, "parameters")


def test_layers_with_a_width_make_up_for_those_without() -> None:
    hybrid = ModelSettings(
        n_layers=4,
        feed_forward=[{**SMALLER, "repeat": 2}, {"kind": "gelu"}, {"kind": "kan"}],
    )
    target = total_cost(ModelSettings(n_layers=4, feed_forward={"kind": "swiglu"}), "parameters")
    solved = solve_widths(hybrid, target, "parameters")
    costs = [cost(spec, 128, "parameters") for spec in solved.feed_forward_by_layer]
    assert costs[:2] == [cost(SMALLER, 128, "parameters")] * 2
    assert costs[2] == pytest.approx(costs[3], rel=0.02)
    assert sum(costs) == pytest.approx(target, rel=0.01)


def test_a_twin_of_another_shape_costs_the_same_in_total() -> None:
    """Widths are solved at the twin's own d_model and number of layers."""
    target = total_cost(ModelSettings(n_layers=4, feed_forward={"kind": "gelu"}), "parameters")
    other = ModelSettings(d_model=192, n_layers=3, feed_forward={"kind": "kat"})
    solved = solve_widths(other, target, "parameters")
    assert total_cost(solved, "parameters") == pytest.approx(target, rel=0.02)


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
        "hidden": 170,
        "base": None,
        "start": "random",
        "basis": {
            "kind": "hermite",
            "degree": 3,
            "constant": False,
            "half_width": 3.0,
            "outside": "squash",
        },
    }


def test_too_small_a_target_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be as small as 10 parameters at d_model = 64"):
        solve_hidden({"kind": "kan"}, 64, parameters=10)
    with pytest.raises(ValueError, match="d_model = 64: hidden = 8 has"):
        solve_hidden({"kind": "kat"}, 64, parameters=10)


@pytest.mark.parametrize("costs", [{}, {"parameters": 100, "flops": 100}])
def test_exactly_one_cost_is_asked_for(costs: dict) -> None:
    with pytest.raises(ValueError, match="either parameters or flops"):
        solve_hidden({"kind": "gelu"}, 8, **costs)
