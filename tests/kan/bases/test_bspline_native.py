"""The compiled B-splines against scipy's in float64, and against the bases' own formulas."""

import numpy as np
import pytest
import torch
from scipy.interpolate import BSpline as Reference

from kanlm.kan import BSpline, cpp_build

pytestmark = pytest.mark.skipif(
    cpp_build.obstacle() is not None, reason=f"no native kernels: {cpp_build.obstacle()}"
)


def uneven(degree: int) -> BSpline:
    basis = BSpline(grid_size=5, degree=degree, equal_cells=False)
    return basis.with_grid(torch.tensor([[-2.0, -0.5, 0.25, 1.0, 1.5, 3.0]]))


@pytest.mark.parametrize("degree", range(6))
@pytest.mark.parametrize("make", [lambda degree: BSpline(grid_size=7, degree=degree), uneven])
def test_values_and_slopes_in_the_range(degree, make) -> None:
    """Also at every knot, where the cell to the right counts."""
    basis = make(degree)
    knots = basis.exact_knots[0].numpy()
    grid = basis.grid[0].numpy()
    inside = np.random.default_rng(0).uniform(grid[0], grid[-1], (50, 11)).astype(np.float32)
    inside[: len(grid) - 1, 0] = grid[:-1]
    x = torch.from_numpy(inside)
    formulas = basis.cpp_formulas()
    assert formulas is not None
    assert formulas.can(x)
    # At knots that float32 rounds, scipy is asked about the side that x is meant to be on.
    exact = np.where(np.isin(inside, grid), inside.astype(float) + 1e-6, inside)
    values = torch.empty(50, basis.num_functions, 11)
    basis.write_values(x, values)
    gradients = torch.randn(50, basis.num_functions, 11)
    dx = basis.pull_back(x, gradients)
    expected_dx = np.zeros_like(exact)
    for b in range(basis.num_functions):
        element = Reference.basis_element(knots[b : b + degree + 2], extrapolate=False)
        expected = np.nan_to_num(element(exact))
        np.testing.assert_allclose(values[:, b].numpy(), expected, atol=4e-6)
        if degree:
            expected_dx += gradients[:, b].numpy() * np.nan_to_num(element.derivative()(exact))
    np.testing.assert_allclose(dx.numpy(), expected_dx, atol=6e-5)


@pytest.mark.parametrize("degree", range(6))
@pytest.mark.parametrize("equal_cells", [True, False])
@pytest.mark.parametrize("shape", [(1, 5), (0, 5), (40, 33)])
def test_tails_as_the_formulas(degree, equal_cells, shape) -> None:
    basis = BSpline(grid_size=6, degree=degree, equal_cells=equal_cells)
    x = 5 * torch.randn(*shape)
    values = torch.full((shape[0], basis.num_functions + 1, shape[1]), 7.0)
    basis.write_values(x, values[:, :-1])
    assert (values[:, -1] == 7).all()
    exact = basis.double()
    torch.testing.assert_close(
        values[:, :-1].mT.double(), exact.values(x.double()), rtol=1e-5, atol=1e-5
    )
    gradients = torch.randn(shape[0], basis.num_functions, shape[1])
    expected = (gradients.mT * exact.derivatives(x.double())).sum(-1)
    basis = basis.float()
    got = basis.pull_back(x, gradients)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=4e-5)


def test_grids_of_single_channels_take_the_formulas() -> None:
    basis = BSpline(3, grid_size=4, per_channel=True)
    x = torch.randn(6, 3)
    values = torch.empty(6, 5, 3)
    basis.write_values(x, values)
    torch.testing.assert_close(values.mT, basis.values(x))
