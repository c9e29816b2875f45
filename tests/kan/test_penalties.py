"""Penalties against scipy's splines and quadrature, and against values worked out by hand."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.interpolate import BSpline as ScipyBSpline
from torch import nn
from torch.autograd import gradcheck

from kanlm.kan import RBF, Basis, BSpline, Chebyshev, KANLinear
from kanlm.kan.penalties import (
    PENALTIES,
    curvature,
    entropy,
    l1,
    l2,
    penalty,
    smoothness,
)


def layer(
    basis: Basis, coefficients: torch.Tensor | None = None, in_features: int = 3
) -> KANLinear:
    """A float64 layer with two outputs and normal coefficients, or with those given."""
    drawn = torch.randn(in_features, basis.num_functions, 2, dtype=torch.float64)
    chosen = drawn if coefficients is None else coefficients
    made = KANLinear(chosen.shape[0], chosen.shape[2], basis=basis).double()
    with torch.no_grad():
        made.coefficients.copy_(chosen)
    return made


def free_spline(degree: int, channels: int | None, grid_size: int = 4) -> BSpline:
    """A spline on cells of unequal widths, other ones for each channel."""
    basis = BSpline(
        channels,
        degree=degree,
        grid_size=grid_size,
        equal_cells=False,
        per_channel=channels is not None,
    ).double()
    widths = 0.3 + torch.rand(basis.knots.shape[0], basis.knots.shape[1], dtype=torch.float64)
    basis.knots.copy_(widths.cumsum(dim=1) - widths.sum(dim=1, keepdim=True) / 2)
    return basis


def integrated_curvature(basis: BSpline, coefficients: np.ndarray, channel: int = 0) -> float:
    """∫ s″² over the grid by scipy's adaptive quadrature, cell by cell."""
    knots = basis.exact_knots[channel].numpy()
    second = ScipyBSpline(knots, coefficients, basis.degree).derivative(2)
    grid = basis.grid[channel].double().numpy()
    cells = itertools.pairwise(grid)
    return sum(quad(lambda x: second(x) ** 2, low, high)[0] for low, high in cells)


@pytest.mark.parametrize("degree", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", ["equal", "free", "per channel"])
def test_curvature_is_the_integral_that_scipy_finds(degree: int, kind: str) -> None:
    torch.manual_seed(degree)
    if kind == "equal":
        basis = BSpline(degree=degree, grid_size=5, grid_range=(-2.0, 1.0))
    else:
        basis = free_spline(degree, 3 if kind == "per channel" else None)
    made = layer(basis)
    expected = sum(
        integrated_curvature(basis, edge, channel=i % len(basis.knots))
        for i, row in enumerate(made.coefficients.detach().numpy())
        for edge in row.T
    )
    assert curvature(made).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("grid_size", [1, 2, 7])
def test_a_parabola_has_the_curvature_of_its_formula(grid_size: int) -> None:
    """∫ (2a)² dx over the grid; a parabola's coefficients are its blossoms at the knots."""
    basis = BSpline(degree=2, grid_size=grid_size, grid_range=(-1.0, 2.0)).double()
    knots = basis.exact_knots[0]
    edge = (0.7 * knots[1:-2] * knots[2:-1]).reshape(1, -1, 1)
    assert curvature(layer(basis, edge)).item() == pytest.approx(3 * 1.4**2, rel=1e-12)


@settings(max_examples=20)
@given(degree=st.integers(2, 5), grid_size=st.integers(1, 9), seed=st.integers(0, 99))
def test_the_curvature_matrix_is_symmetric_and_knows_straight_lines(degree, grid_size, seed):
    torch.manual_seed(seed)
    basis = free_spline(degree, 2, grid_size)
    matrix = basis.curvature_matrix()
    assert matrix.dtype == torch.float64
    # Entries of long sums may be small beside what they are the sum of.
    atol = 1e-14 * matrix.abs().max().item()
    torch.testing.assert_close(matrix, matrix.mT, rtol=1e-12, atol=atol)
    scale = matrix.abs().max().item()
    assert torch.linalg.eigvalsh(matrix).min().item() > -1e-12 * scale
    # Averages of the inner knots are the coefficients of x (Marsden's identity).
    windows = basis.knots[:, 1:-1].unfold(1, degree, 1)
    lines = torch.stack([torch.ones_like(windows[..., 0]), windows.mean(dim=-1)], dim=-1)
    assert (matrix @ lines).abs().max().item() < 1e-12 * scale * lines.abs().max().item()


def test_curvature_follows_knots_that_have_moved() -> None:
    basis = free_spline(3, None)
    made = layer(basis)
    before = curvature(made).item()
    basis.knots.mul_(2)
    # x → x/2 divides f″² by 16 and stretches the interval by 2.
    assert curvature(made).item() == pytest.approx(before / 8, rel=1e-12)


def test_curvature_at_single_precision() -> None:
    made = layer(BSpline(degree=3, grid_size=8), in_features=16)
    exact = curvature(made).item()
    assert curvature(made.float()).item() == pytest.approx(exact, rel=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert curvature(made).item() == pytest.approx(exact, rel=1e-6)


def test_curvature_of_smooth_functions_on_fine_grids_at_single_precision() -> None:
    """A line has next to none, and a sine's is ½ (6 − sin 6)."""
    line = KANLinear(8, 8, basis=BSpline(degree=3, grid_size=200), start="linear")
    assert abs(curvature(line).item()) < 1e-3
    basis = BSpline(degree=3, grid_size=200)
    x = torch.linspace(-3 - 0.03, 3 + 0.03, 203).reshape(1, -1, 1)
    made = layer(basis, x.sin()).float()
    expected = 3 - math.sin(6) / 2
    assert curvature(made).item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("basis", "line"),
    [
        (BSpline(degree=1), "curvature of bspline1-g6: degree = 1 has no second derivative"),
        (BSpline(degree=0), "curvature of bspline0-g6: degree = 0 has no second derivative"),
        (Chebyshev(), "curvature of chebyshev4: expected a bspline"),
    ],
)
def test_curvature_is_refused_where_there_is_none(basis: Basis, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        curvature(layer(basis))


@pytest.mark.parametrize("basis", [BSpline(grid_size=3), RBF(centers=4)])
def test_smoothness_is_the_sum_of_squared_second_differences(basis: Basis) -> None:
    edges = torch.tensor([[1.0, 2.0, 4.0, 4.0], [0.0, 1.0, 2.0, 3.0]])
    assert smoothness(layer(basis, edges.T.unsqueeze(0))).item() == 1.0**2 + (-2.0) ** 2


def test_smoothness_is_curvature_for_parabolas_on_equal_cells() -> None:
    """φ″ is Δ²c / h² on each cell, so that the integral is Σ (Δ²c)² / h³."""
    made = layer(BSpline(degree=2, grid_size=6, grid_range=(-3.0, 0.0)))
    assert curvature(made).item() == pytest.approx(smoothness(made).item() / 0.5**3, rel=1e-12)


def test_smoothness_is_refused_where_functions_are_in_no_row() -> None:
    with pytest.raises(ValueError, match="smoothness of chebyshev4: expected a basis whose"):
        smoothness(layer(Chebyshev()))
    with pytest.raises(ValueError, match="smoothness of bspline1-g1: expected at least 3"):
        smoothness(layer(BSpline(grid_size=1)))


def test_values_worked_out_by_hand() -> None:
    edges = torch.tensor([[[1.0, 0.0], [-2.0, 0.0], [3.0, 0.0]], [[0.0, 6.0]] * 3])
    made = layer(BSpline(grid_size=2), edges)
    assert l2(made).item() == 1 + 4 + 9 + 3 * 36
    assert l1(made).item() == 2 + 6
    expected = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert entropy(made).item() == pytest.approx(expected, abs=1e-12)


def test_entropy_lies_between_one_edge_and_all_alike() -> None:
    basis = BSpline(grid_size=2)
    one = torch.zeros(3, 3, 2)
    one[1, :, 1] = 5.0
    assert entropy(layer(basis, one)).item() == pytest.approx(0.0, abs=1e-12)
    alike = entropy(layer(basis, torch.full((3, 3, 2), -0.3)))
    assert alike.item() == pytest.approx(math.log(6), abs=1e-12)


def test_l1_bounds_the_mean_of_the_functions_over_the_grid() -> None:
    """With B / G, as the module says."""
    torch.manual_seed(0)
    made = layer(BSpline(degree=3, grid_size=4))
    x = torch.linspace(-3, 3, 4001, dtype=torch.float64).unsqueeze(-1)
    functions = torch.einsum("nb,ibo->nio", made.basis.values(x).squeeze(1), made.coefficients)
    bound = made.basis.num_functions / 4 * l1(made).item()
    assert 0.3 * bound < functions.abs().mean(dim=0).sum().item() <= bound


@pytest.mark.parametrize("name", PENALTIES)
def test_gradients(name: str) -> None:
    torch.manual_seed(0)
    made = layer(BSpline(degree=3, grid_size=2))

    def of(coefficients: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(
            _Penalty(made, name), {"layer.coefficients": coefficients}, ()
        )

    assert gradcheck(of, made.coefficients.detach().requires_grad_())


class _Penalty(nn.Module):
    def __init__(self, made: KANLinear, name: str) -> None:
        super().__init__()
        self.layer, self.name = made, name

    def forward(self) -> torch.Tensor:
        return PENALTIES[self.name](self.layer)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PENALTIES)
def test_zero_coefficients_have_no_penalty_and_no_gradient(name: str, dtype) -> None:
    made = KANLinear(3, 2, basis=BSpline(degree=3), start="zero").to(dtype)
    value = PENALTIES[name](made)
    value.backward()
    assert value.item() == 0
    assert made.coefficients.grad is not None
    assert made.coefficients.grad.abs().max().item() == 0


@pytest.mark.parametrize("scale", [1e-36, 1e-9, 1.0, 1e9])
def test_entropy_of_edges_that_are_zero_is_finite_in_value_and_gradient(scale: float) -> None:
    made = KANLinear(3, 2, basis=BSpline())
    with torch.no_grad():
        made.coefficients.mul_(scale)[:2] = 0
    value = entropy(made)
    value.backward()
    assert made.coefficients.grad is not None
    assert made.coefficients.grad.isfinite().all()
    assert (made.coefficients.grad[:2] == 0).all()
    assert 0 <= value.item() <= math.log(6)


def test_many_edges_have_their_full_entropy_in_single_precision() -> None:
    """Shares of 1e-7 and less are below eps, and must not be taken for 0."""
    made = KANLinear(4096, 4096, basis=BSpline(grid_size=1, degree=0), base=None)
    nn.init.ones_(made.coefficients)
    assert entropy(made).item() == pytest.approx(2 * math.log(4096), rel=1e-5)


def test_a_model_is_penalised_in_all_its_layers_and_nowhere_else() -> None:
    first, second = layer(BSpline(degree=2)), layer(BSpline(degree=3), in_features=2)
    model = nn.Sequential(first, nn.Linear(2, 2), nn.Sequential(second))
    total = penalty(model, {"l1": 0.5, "curvature": 2.0, "entropy": 0.0})
    parts = [0.5 * l1(part) + 2.0 * curvature(part) for part in (first, second)]
    assert total.item() == pytest.approx(sum(part.item() for part in parts), rel=1e-12)


def test_a_weight_of_zero_asks_nothing_of_the_basis() -> None:
    assert penalty(layer(Chebyshev()), {"curvature": 0.0, "smoothness": 0.0}).item() == 0


def test_a_model_without_edges_is_refused() -> None:
    with pytest.raises(ValueError, match="no KAN layer"):
        penalty(nn.Linear(2, 2), {"l1": 1.0})


def test_a_layer_without_memory_is_checked_too() -> None:
    """Settings are refused before a model has numbers."""
    with torch.device("meta"):
        cubic = KANLinear(3, 2, basis=BSpline(degree=3))
        linear = KANLinear(3, 2, basis=BSpline(degree=1))
    assert penalty(cubic, dict.fromkeys(PENALTIES, 1.0)).shape == ()
    with pytest.raises(ValueError, match="degree = 1"):
        penalty(linear, {"curvature": 1.0})
