"""B-splines against scipy's, which evaluates de Boor's recursion in compiled code."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import interpolate
from torch import Tensor

from kanlm.kan import BSpline, KANLinear

DEGREES = (0, 1, 2, 3, 4, 5)
GRIDS = ("equal", "free", "equal-per-channel", "free-per-channel")
CHANNELS = 3


def make_basis(degree: int, cells: int, kind: str = "equal", seed: int = 0) -> BSpline:
    """Splines in float64 on a random grid of a kind in GRIDS, for CHANNELS inputs."""
    draw = torch.Generator().manual_seed(seed)
    rows = CHANNELS if kind.endswith("per-channel") else 1
    equal = kind.startswith("equal")
    widths = torch.rand(rows, 1 if equal else cells, generator=draw, dtype=torch.float64) + 0.1
    widths = widths.expand(rows, cells)
    start = -3 * torch.rand(rows, 1, generator=draw, dtype=torch.float64)
    grid = torch.cat([start, start + widths.cumsum(dim=1)], dim=1)
    if equal:
        steps = torch.linspace(0, 1, cells + 1, dtype=torch.float64)
        grid = torch.lerp(grid[:, :1], grid[:, -1:], steps)
    basis = BSpline(degree=degree, grid_size=cells, equal_cells=equal)
    return basis.double().with_grid(grid)


def scipy_values(basis: BSpline, x: Tensor, derivative: int = 0) -> np.ndarray:
    """(n, in, B) of scipy's splines on the same knots, for x (n, in) within the grid."""
    columns = []
    for i in range(x.shape[1]):
        knots = basis.knots[i if len(basis.knots) > 1 else 0].numpy()
        if derivative > basis.degree:
            columns.append(np.zeros((len(x), basis.num_functions)))
            continue
        splines = interpolate.BSpline(knots, np.eye(basis.num_functions), basis.degree)
        columns.append(splines(x[:, i].numpy(), nu=derivative))
    return np.stack(columns, axis=1)


def autograd_derivatives(basis: BSpline, x: Tensor) -> Tensor:
    """Derivatives (n, in, B) of all functions by autograd."""
    x = x.clone().requires_grad_()
    values = basis.values(x)
    if not values.requires_grad:
        return torch.zeros_like(values)
    columns = [
        torch.autograd.grad(column.sum(), x, retain_graph=True)[0] for column in values.unbind(-1)
    ]
    return torch.stack(columns, dim=-1)


def inside(basis: BSpline) -> Tensor:
    """Points between the knots of each channel's grid, and every one of the knots."""
    grid = basis.grid.expand(CHANNELS, -1).T
    between = torch.linspace(0, 1, 97, dtype=torch.float64).unsqueeze(-1)
    return torch.cat([torch.lerp(grid[:1], grid[-1:], between), grid])


@pytest.fixture(params=[(d, g, k) for d in DEGREES for g in (1, 2, 7) for k in GRIDS], ids=str)
def basis(request: pytest.FixtureRequest) -> BSpline:
    return make_basis(*request.param)


def test_values_are_scipys(basis: BSpline) -> None:
    x = inside(basis)
    ours = basis.values(x)
    assert ours.shape == (*x.shape, basis.num_functions)
    np.testing.assert_allclose(ours.numpy(), scipy_values(basis, x), rtol=0, atol=1e-12)


def test_derivatives_are_scipys(basis: BSpline) -> None:
    """Also at the knots, where a piecewise linear function has its derivative from the right."""
    # scipy has no cell right of the last knot, and takes the one to its left, as we do.
    x = inside(basis)
    theirs = scipy_values(basis, x, derivative=1)
    np.testing.assert_allclose(basis.derivatives(x).numpy(), theirs, rtol=0, atol=1e-10)
    np.testing.assert_allclose(autograd_derivatives(basis, x).numpy(), theirs, rtol=0, atol=1e-10)


def test_tails_are_linear(basis: BSpline) -> None:
    for end, outwards in zip(basis.ends.T, (-1.0, 1.0), strict=True):
        edge = end.expand(1, CHANNELS)
        value, slope = scipy_values(basis, edge), scipy_values(basis, edge, derivative=1)
        for distance in (0.1, 2.5, 1000.0):
            far = edge + outwards * distance
            expected = value + outwards * distance * slope
            np.testing.assert_allclose(basis.values(far).numpy(), expected, rtol=1e-10, atol=1e-10)
            np.testing.assert_allclose(basis.derivatives(far).numpy(), slope, atol=1e-10)
            np.testing.assert_allclose(autograd_derivatives(basis, far), slope, atol=1e-10)


@settings(max_examples=60)
@given(
    degree=st.sampled_from(DEGREES),
    cells=st.integers(1, 20),
    kind=st.sampled_from(GRIDS),
    shape=st.lists(st.integers(0, 4), max_size=2),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 100),
)
def test_functions_sum_to_one(degree, cells, kind, shape, dtype, seed) -> None:
    basis = make_basis(degree, cells, kind, seed).to(dtype)
    draw = torch.Generator().manual_seed(seed)
    x = 4 * torch.randn(*shape, CHANNELS, dtype=dtype, generator=draw)
    values = basis.values(x)
    assert values.shape == (*shape, CHANNELS, cells + degree)
    assert values.dtype == dtype
    # In the tails large values of both signs cancel.
    tolerance = 30 * torch.finfo(dtype).eps * values.abs().sum(-1)
    assert ((values.sum(-1) - 1).abs() <= tolerance).all()
    slopes = basis.derivatives(x)
    assert (slopes.sum(-1).abs() <= 30 * torch.finfo(dtype).eps * slopes.abs().sum(-1)).all()


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("degree", DEGREES)
def test_functions_without_inputs_are_exactly_zero(degree: int, kind: str) -> None:
    """Values and the gradients of coefficients: AdamW makes full steps of rounding errors."""
    basis = make_basis(degree, 11, kind).float()
    layer = KANLinear(CHANNELS, 4, basis=basis, base=None)
    grid = basis.grid.expand(CHANNELS, -1)
    share = torch.rand(50, CHANNELS, generator=torch.Generator().manual_seed(0))
    x = torch.lerp(grid[:, 5], grid[:, 6], 0.02 + 0.96 * share)
    layer(x).square().sum().backward()
    assert layer.coefficients.grad is not None
    expected = [5 <= b <= 5 + degree for b in range(basis.num_functions)]
    for touched in (basis.values(x) != 0, layer.coefficients.grad.transpose(1, 2) != 0):
        assert touched.flatten(0, -2).any(dim=0).tolist() == expected


@pytest.mark.parametrize("degree", DEGREES)
def test_active_are_the_functions_over_the_cell(degree: int) -> None:
    basis = make_basis(degree, 6, "free")
    x = inside(basis)
    first, local = basis.active(x)
    assert local.shape == (*x.shape, degree + 1)
    values = basis.values(x)
    positions = first.unsqueeze(-1) + torch.arange(degree + 1)
    torch.testing.assert_close(values.gather(-1, positions), local, rtol=0, atol=0)
    assert (values != 0).sum() == (local != 0).sum()


def test_equal_cells_are_a_faster_way_to_the_same() -> None:
    for degree in DEGREES:
        fast = make_basis(degree, 5, "equal-per-channel")
        slow = BSpline(degree=degree, grid_size=5, equal_cells=False).double().with_grid(fast.grid)
        x = 3 * torch.randn(200, CHANNELS, dtype=torch.float64)
        torch.testing.assert_close(fast.values(x), slow.values(x), rtol=1e-11, atol=1e-11)


def test_mean_square_is_known_without_memory() -> None:
    with torch.device("meta"):
        basis = BSpline(degree=2)
    assert basis.knots.is_meta
    assert basis.mean_square == BSpline(degree=2).mean_square


def test_knots_are_saved() -> None:
    assert list(BSpline().state_dict()) == ["knots"]


def test_knots_keep_their_precision() -> None:
    """0.6 in bfloat16 is 0.6016, a hundredth of a cell away."""
    basis = BSpline(grid_size=10)
    exact = basis.knots.clone()
    KANLinear(2, 2, basis=basis).bfloat16()
    assert torch.equal(basis.knots, exact)
    assert BSpline(grid_size=10).half().float().knots.equal(exact)
    assert basis.double().knots.dtype == torch.float64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid_size": 0}, "grid_size = 0"),
        ({"degree": 6}, "degree = 6"),
        ({"grid_range": (1.0, 1.0)}, "grid_range"),
        ({"grid_range": (0.0, math.inf)}, "finite"),
        ({"grid_range": (-math.inf, 0.0)}, "finite"),
        ({"grid_range": (1e8, 1e8 + 1)}, "cells vanish"),
    ],
)
def test_impossible_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BSpline(**options)


def test_impossible_grids_are_refused() -> None:
    with pytest.raises(ValueError, match="increase"):
        BSpline(equal_cells=False).with_grid(torch.tensor([[0.0, 1.0, 1.0, 2.0]]))
    with pytest.raises(ValueError, match="equally wide"):
        BSpline().with_grid(torch.tensor([[0.0, 1.0, 1.5, 2.0]]))


@pytest.mark.parametrize("cells", [6, 500, 2000])
def test_a_grid_that_was_rounded_is_still_of_equal_cells(cells: int) -> None:
    for ends in ((-3.0, 3.0), (100.0, 110.0)):
        basis = BSpline(grid_size=cells, grid_range=ends)
        assert torch.equal(basis.with_grid(basis.grid).grid, basis.grid)
