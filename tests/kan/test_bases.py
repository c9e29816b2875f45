"""B-splines against scipy's, which evaluates de Boor's recursion in compiled code."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import interpolate
from torch.autograd import gradcheck

from kanlm.kan import BSpline

DEGREES = (1, 2, 3, 4, 5)
RANGES = ((-3.0, 3.0), (-0.7, 2.1))


def scipy_values(basis: BSpline, x: np.ndarray, derivative: int = 0) -> np.ndarray:
    """Values (n, B) of scipy's splines on the same knots, its polynomials never extended."""
    knots = basis.knots[0].numpy()
    columns = []
    for j in range(basis.num_functions):
        unit = np.eye(basis.num_functions)[j]
        spline = interpolate.BSpline(knots, unit, basis.degree)
        columns.append((spline.derivative(derivative) if derivative else spline)(x))
    return np.stack(columns, axis=-1)


def derivatives(basis: BSpline, x: torch.Tensor) -> torch.Tensor:
    """Derivatives (n, B) of all functions by autograd."""
    x = x.clone().requires_grad_()
    values = basis.values(x.unsqueeze(-1))[:, 0]
    columns = [torch.autograd.grad(column.sum(), x, retain_graph=True)[0] for column in values.T]
    return torch.stack(columns, dim=-1)


@pytest.fixture(params=itertools.product(DEGREES, (1, 2, 6, 13), RANGES), ids=str)
def basis(request: pytest.FixtureRequest) -> BSpline:
    degree, grid_size, grid_range = request.param
    torch.set_default_dtype(torch.float64)
    made = BSpline(grid_size=grid_size, degree=degree, grid_range=grid_range)
    torch.set_default_dtype(torch.float32)
    return made


def inside(basis: BSpline) -> torch.Tensor:
    """Points between the knots of the grid, and every one of the knots."""
    low, high = basis.grid_range
    knots = basis.grid[0]
    return torch.cat([torch.linspace(low, high, 211, dtype=torch.float64), knots])


def test_values_are_scipys(basis: BSpline) -> None:
    x = inside(basis)
    ours = basis.values(x.unsqueeze(-1))[:, 0]
    assert ours.shape == (len(x), basis.num_functions)
    np.testing.assert_allclose(ours.numpy(), scipy_values(basis, x.numpy()), rtol=0, atol=1e-12)


def test_derivatives_are_scipys(basis: BSpline) -> None:
    """Also at the knots, where a piecewise linear function has its derivative from the right."""
    # scipy has no cell right of the last knot, and takes the one to its left, as we do.
    x = inside(basis)
    theirs = scipy_values(basis, x.numpy(), derivative=1)
    np.testing.assert_allclose(derivatives(basis, x).numpy(), theirs, rtol=0, atol=1e-10)


def test_tails_are_linear(basis: BSpline) -> None:
    for edge, outwards in zip(basis.grid_range, (-1.0, 1.0), strict=True):
        x = np.array([edge])
        value, slope = scipy_values(basis, x), scipy_values(basis, x, derivative=1)
        for distance in (0.1, 2.5, 1000.0):
            far = torch.tensor([edge + outwards * distance], dtype=torch.float64)
            expected = value + outwards * distance * slope
            got = basis.values(far.unsqueeze(-1))[:, 0]
            np.testing.assert_allclose(got.numpy(), expected, rtol=1e-12, atol=1e-10)
            np.testing.assert_allclose(derivatives(basis, far).numpy(), slope, atol=1e-10)


@settings(deadline=None, max_examples=60)
@given(
    degree=st.sampled_from(DEGREES),
    grid_size=st.integers(1, 20),
    low=st.floats(-5, 2),
    width=st.floats(0.5, 8),
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 100),
)
def test_functions_sum_to_one(degree, grid_size, low, width, shape, dtype, seed) -> None:
    basis = BSpline(degree=degree, grid_size=grid_size, grid_range=(low, low + width)).to(dtype)
    x = 4 * torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    values = basis.values(x)
    assert values.shape == (*shape, grid_size + degree)
    assert values.dtype == dtype
    # In the tails large values of both signs cancel.
    tolerance = 20 * torch.finfo(dtype).eps * values.abs().sum(-1)
    assert ((values.sum(-1) - 1).abs() <= tolerance).all()


@pytest.mark.parametrize("degree", DEGREES)
def test_gradcheck(degree: int) -> None:
    basis = BSpline(degree=degree).double()
    x = torch.tensor([[-4.1, -2.9, 0.3], [1.7, 2.2, 3.4]], dtype=torch.float64)
    assert gradcheck(basis.values, x.requires_grad_())


@pytest.mark.parametrize("degree", DEGREES)
def test_mean_square_is_that_of_normal_samples(degree: int) -> None:
    basis = BSpline(degree=degree, grid_size=5)
    z = torch.randn(400_000, generator=torch.Generator().manual_seed(0))
    sampled = basis.values(z.unsqueeze(-1)).square().sum(-1).mean()
    assert basis.mean_square == pytest.approx(sampled.item(), rel=5e-3)


def test_mean_square_is_known_without_memory() -> None:
    with torch.device("meta"):
        basis = BSpline(degree=2)
    assert basis.knots.is_meta
    assert basis.mean_square == BSpline(degree=2).mean_square


def test_knots_are_saved() -> None:
    assert list(BSpline().state_dict()) == ["knots"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid_size": 0}, "grid_size = 0"),
        ({"degree": 6}, "degree = 6"),
        ({"grid_range": (1.0, 1.0)}, "grid_range"),
    ],
)
def test_impossible_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BSpline(**options)
