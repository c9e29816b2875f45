"""Refinement that changes nothing, moments that follow it, and refits that keep functions."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kanlm.kan import (
    BSpline,
    Chebyshev,
    Fourier,
    KANLinear,
    Rational,
    adapt_layer,
    grid_from_quantiles,
    input_quantiles,
    refine_layer,
    refine_moments,
    refit_layer,
)

IN, OUT = 3, 4


def spline_layer(degree: int, cells: int, *, equal: bool, rows: int, seed: int = 0) -> KANLinear:
    """A layer in float32 on a random grid, shared or one a channel."""
    torch.manual_seed(seed)
    basis = BSpline(degree=degree, grid_size=cells, equal_cells=equal)
    widths = (torch.rand(rows, 1 if equal else cells) + 0.3).expand(rows, cells)
    grid = torch.cat([torch.zeros(rows, 1), widths.cumsum(dim=1).double()], dim=1) - 2
    if equal:
        steps = torch.linspace(0, 1, cells + 1, dtype=torch.float64)
        grid = torch.lerp(grid[:, :1], grid[:, -1:], steps)
    return KANLinear(IN, OUT, basis=basis.with_grid(grid))


@settings(max_examples=60)
@given(
    degree=st.integers(0, 5),
    cells=st.integers(1, 8),
    parts=st.integers(1, 5),
    equal=st.booleans(),
    rows=st.sampled_from([1, IN]),
    seed=st.integers(0, 50),
)
def test_refinement_keeps_the_function(degree, cells, parts, equal, rows, seed) -> None:
    """In float32 to 1e-6, tails included."""
    layer = spline_layer(degree, cells, equal=equal, rows=rows, seed=seed)
    assert isinstance(layer.basis, BSpline)
    x = torch.cat([6 * torch.rand(200, IN) - 3, 100 * torch.randn(20, IN)])
    if degree == 0:  # off the jumps, which rounding may move
        near = (x.unsqueeze(-1) - layer.basis.grid.unsqueeze(0)).abs().min(dim=-1).values < 1e-5
        x = torch.where(near, x + 1e-3, x)
    with torch.no_grad():
        before, terms = layer(x), layer.basis.values(x).abs().sum(dim=(1, 2)).unsqueeze(-1)
        matrix = refine_layer(layer, cells * parts)
        after = layer(x)
    assert isinstance(layer.basis, BSpline)
    assert layer.basis.grid_size == cells * parts
    assert layer.coefficients.shape == (IN, cells * parts + degree, OUT)
    # In the tails, values are large, or differences of large terms.
    scale = torch.maximum(terms, before.abs()).clamp(min=1)
    assert ((after - before).abs() <= 1e-6 * scale).all()
    assert (matrix >= 0).all()
    ones = torch.ones(matrix.shape[:2], dtype=torch.float64)
    torch.testing.assert_close(matrix.sum(dim=-1), ones, rtol=0, atol=1e-12)


@pytest.mark.parametrize("width", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("degree", [1, 2])
def test_refinement_keeps_the_function_in_narrow_cells(degree: int, width: float) -> None:
    """Where float32 rounds the new knots by no small part of a cell."""
    torch.manual_seed(0)
    grid = torch.tensor([[-3.0, 0.0, 2.1, 2.1 + width, 3.0]])
    basis = BSpline(degree=degree, grid_size=4, equal_cells=False).with_grid(grid)
    layer = KANLinear(1, OUT, basis=basis, base=None)
    x = (2.1 + width * torch.linspace(-1, 2, 301)).unsqueeze(-1)
    before = layer(x)
    for cells in (8, 24):
        refine_layer(layer, cells)
        torch.testing.assert_close(layer(x), before, rtol=1e-6, atol=1e-6)


def test_refinement_in_steps_is_refinement_at_once() -> None:
    for degree in (1, 3):
        layer = spline_layer(degree, 3, equal=False, rows=IN).double()
        other = copy.deepcopy(layer)
        product = refine_layer(layer, 6)
        product = refine_layer(layer, 12) @ product
        torch.testing.assert_close(product, refine_layer(other, 12), rtol=0, atol=1e-6)
        torch.testing.assert_close(layer.basis.ends, other.basis.ends)
        # As safetensors wants what it saves.
        assert layer.basis.get_buffer("knots").is_contiguous()


def test_impossible_refinements_are_refused() -> None:
    with pytest.raises(ValueError, match="grid_size = 10: expected a multiple of 6"):
        refine_layer(KANLinear(2, 2, basis=BSpline()), 10)
    with pytest.raises(ValueError, match="grid_size = 3"):
        refine_layer(KANLinear(2, 2, basis=BSpline()), 3)
    with pytest.raises(ValueError, match="chebyshev4"):
        refine_layer(KANLinear(2, 2, basis=Chebyshev()), 8)


def test_a_refined_layer_keeps_its_kind() -> None:
    layer = KANLinear(IN, OUT, basis=BSpline(IN, per_channel=True, grid_size=2), start="zero")
    layer.to(torch.bfloat16).coefficients.requires_grad_(False)
    refine_layer(layer, 4)
    assert layer.coefficients.dtype == torch.bfloat16
    assert not layer.coefficients.requires_grad
    assert layer.basis.channels == IN
    assert layer.label == "bspline1-g4-silu"
    assert layer(torch.randn(2, IN, dtype=torch.bfloat16)).shape == (2, OUT)


def adamw(layer: KANLinear, moments: tuple[Tensor, Tensor] | None = None, step: int = 0):
    """AdamW on the coefficients, going on from moments if there are some."""
    optimizer = torch.optim.AdamW(
        [layer.coefficients], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1
    )
    if moments is not None:
        optimizer.state[layer.coefficients] = {
            "step": torch.tensor(float(step)),
            "exp_avg": moments[0].clone(),
            "exp_avg_sq": moments[1].clone(),
        }
    return optimizer


def trained(degree: int, noise: float = 1.0):
    """A layer after 200 steps on noisy minibatches, its moments, and how to draw a batch."""
    torch.manual_seed(0)
    layer = KANLinear(IN, OUT, basis=BSpline(degree=degree), base=None).double()
    mix = torch.randn(IN, OUT, dtype=torch.float64)

    def batch() -> tuple[Tensor, Tensor]:
        x = torch.randn(256, IN, dtype=torch.float64)
        return x, torch.sin(2 * x) @ mix + noise * torch.randn(256, OUT, dtype=torch.float64)

    optimizer = adamw(layer)
    for _ in range(200):
        descend(layer, optimizer, batch())
    state = optimizer.state[layer.coefficients]
    return layer, (state["exp_avg"], state["exp_avg_sq"]), batch


def descend(layer: KANLinear, optimizer, batch: tuple[Tensor, Tensor]) -> None:
    optimizer.zero_grad()
    (layer(batch[0]) - batch[1]).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("degree", [0, 1, 3])
def test_a_step_without_gradient_moves_the_function_alike(degree: int, parts: int) -> None:
    """Momentum and weight decay of torch's own AdamW, before and after a refinement."""
    layer, moments, _ = trained(degree)
    x = 2 * torch.randn(300, IN, dtype=torch.float64)
    moved = []
    for grid_size in (6, 6 * parts):
        other = copy.deepcopy(layer)
        mapped = refine_moments(refine_layer(other, grid_size), *moments)
        assert (mapped[1] >= 0).all()
        optimizer = adamw(other, mapped, step=200)
        before = other(x)
        other.coefficients.grad = torch.zeros_like(other.coefficients)
        optimizer.step()
        moved.append((other(x) - before).detach())
    assert moved[0].abs().mean() > 1e-4
    assert (moved[1] - moved[0]).abs().max() < 1e-5 * moved[0].abs().max()


@pytest.mark.parametrize("degree", [1, 3])
def test_the_first_step_moves_the_function_almost_alike(degree: int) -> None:
    """With a new gradient; closer than with both moments prolonged, or with none."""
    layer, moments, batch = trained(degree)
    x, data = torch.randn(500, IN, dtype=torch.float64), batch()

    def move(grid_size: int, rule) -> Tensor:
        other = copy.deepcopy(layer)
        mapped = rule(refine_layer(other, grid_size), *moments)
        optimizer = adamw(other, mapped, step=200)
        before = other(x)
        descend(other, optimizer, data)
        return (other(x) - before).detach()

    coarse = move(6, refine_moments)
    rules = {
        "ours": refine_moments,
        "both prolonged": lambda matrix, m, v: (matrix @ m, matrix @ v),
        "none": lambda matrix, m, v: None,
    }
    errors = {
        name: ((move(12, rule) - coarse).square().mean() / coarse.square().mean()).sqrt().item()
        for name, rule in rules.items()
    }
    assert errors["ours"] < 0.3
    assert errors["ours"] < 0.8 * errors["both prolonged"]
    assert errors["ours"] < 0.3 * errors["none"]


def test_moments_by_hand() -> None:
    """One cell split in two, linear splines: the middle lies halfway between the ends."""
    _, matrix = BSpline(grid_size=1).refined(2)
    assert matrix[0].tolist() == [[1, 0], [0.5, 0.5], [0, 1]]
    mean = torch.tensor([[[2.0], [-1.0]]])
    square = torch.tensor([[[4.0], [1.0]]])
    new_mean, new_square = refine_moments(matrix, mean, square, eps=0.0)
    # Two ends of 2/3 and a middle of half of either, each shared by 1.5 functions.
    torch.testing.assert_close(new_square[0, :, 0], torch.tensor([4.0, 2.5, 1.0]) / 1.5)
    direction = new_mean / new_square.sqrt()
    torch.testing.assert_close(direction[0, :, 0], torch.tensor([1.0, 0.0, -1.0]))
    assert new_square.sum().item() == pytest.approx(5.0)


def test_moments_of_unused_functions_stay_zero() -> None:
    _, matrix = BSpline(grid_size=4).refined(8)
    zeros = torch.zeros(2, 5, 3)
    for moment in refine_moments(matrix, zeros, zeros, eps=0.0):
        assert moment.shape == (2, 9, 3)
        assert (moment == 0).all()


def test_quantiles_are_numpys() -> None:
    x = torch.randn(101, 3).double()
    levels = np.linspace(0.02, 0.98, 7)
    ours = input_quantiles(x, 7, tail=0.02)
    np.testing.assert_allclose(ours, np.quantile(x.numpy(), levels, axis=0).T, atol=1e-12)
    assert input_quantiles(x[:1], 4).shape == (3, 4)


def test_grids_between_uniform_and_quantiles() -> None:
    quantiles = torch.tensor([[0.0, 0.1, 0.2, 0.4, 2.0]])
    uniform = torch.tensor([[0.0, 0.5, 1.0, 1.5, 2.0]])
    for share in (0.0, 0.02, 1.0):
        grid = grid_from_quantiles(quantiles, 4, uniform_share=share)
        expected = share * uniform + (1 - share) * quantiles
        torch.testing.assert_close(grid, expected.double(), atol=1e-7, rtol=0)
    wide = grid_from_quantiles(quantiles, 4, margin=0.1)
    torch.testing.assert_close(wide, 1.2 * uniform.double() - 0.2, atol=1e-7, rtol=0)
    between = grid_from_quantiles(uniform[:, ::2], 4, uniform_share=0.0)
    torch.testing.assert_close(between, uniform.double())


def test_channels_without_spread_get_a_range() -> None:
    for value in (0.0, 5.0, -3000.0):
        layer = KANLinear(2, 2, basis=BSpline(2, per_channel=True))
        x = torch.full((10, 2), value)
        before = layer(x)
        refit = adapt_layer(layer, x)
        assert refit.error < 1e-6
        torch.testing.assert_close(layer(x), before, rtol=1e-4, atol=1e-4)
        low, high = layer.basis.ends.unbind(dim=1)
        assert ((low < value) & (value < high)).all()


@pytest.mark.parametrize("degree", [1, 3])
def test_refit_to_a_grid_that_holds_the_old_is_exact(degree: int) -> None:
    """Also where no input was seen, and in float32 to its rounding."""
    layer = spline_layer(degree, 4, equal=True, rows=1)
    assert isinstance(layer.basis, BSpline)
    x = 0.5 * torch.rand(300, IN) - 1
    everywhere = torch.linspace(-2, -0.9, 100).unsqueeze(-1).expand(-1, IN)
    before = layer(everywhere)
    finer, _ = layer.basis.refined(12)
    refit = refit_layer(layer, finer, x)
    assert refit.error < 1e-6
    torch.testing.assert_close(layer(everywhere), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [lambda: BSpline(grid_size=9), Chebyshev, Fourier, Rational])
def test_refit_is_the_least_squares_fit(make) -> None:
    """Of numpy, edge by edge; and the error reported is the one that is left."""
    torch.manual_seed(0)
    layer = KANLinear(IN, OUT, basis=BSpline(degree=3, grid_size=5), base=None).double()
    x = torch.randn(2000, IN, dtype=torch.float64)
    old = torch.einsum("nib,ibo->nio", layer.basis.values(x), layer.coefficients).detach()
    basis = make().double()
    refit = refit_layer(layer, basis, x)
    values = basis.values(x).detach()
    new = torch.einsum("nib,ibo->nio", values, layer.coefficients).detach()
    best = torch.empty_like(new)
    for i in range(IN):
        solution = np.linalg.lstsq(values[:, i].numpy(), old[:, i].numpy(), rcond=None)[0]
        best[:, i] = values[:, i] @ torch.from_numpy(solution)

    def error(fitted: Tensor) -> float:
        return ((fitted - old).square().sum() / old.square().sum()).sqrt().item()

    assert refit.error == pytest.approx(error(new), rel=1e-6)
    assert error(new) == pytest.approx(error(best), rel=1e-3)
    assert error(new) > 1e-3


def test_refit_needs_no_full_rank() -> None:
    """Fewer inputs than functions, all of them in one cell: pykan's least squares fails."""
    layer = spline_layer(3, 6, equal=False, rows=IN)
    x = torch.full((2, IN), -1.9)
    before = layer(x)
    refit = adapt_layer(layer, x, uniform_share=0.02)
    assert refit.error < 1e-5
    assert torch.isfinite(layer.coefficients).all()
    torch.testing.assert_close(layer(x), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, IN])
@pytest.mark.parametrize("uniform_share", [1.0, 0.02])
def test_adaptation_covers_the_inputs_and_keeps_the_function(rows, uniform_share) -> None:
    """A layer whose inputs moved to a narrow range off the middle, its old grid coarse there."""
    torch.manual_seed(0)
    basis = BSpline(IN, degree=3, grid_size=8, equal_cells=uniform_share == 1, per_channel=rows > 1)
    layer = KANLinear(IN, OUT, basis=basis)
    x = 0.3 * torch.randn(4000, IN) + 1
    before = layer(x)
    refit = adapt_layer(layer, x, uniform_share=uniform_share)
    assert refit.matrix.shape == (IN, 11, 11)
    assert refit.error < 0.02
    after = layer(x)
    assert (after - before).square().mean().sqrt() < 0.02 * before.square().mean().sqrt()
    low, high = layer.basis.ends.unbind(dim=1)
    assert ((x >= low) & (x <= high)).float().mean() > 0.99
    assert (high - low).max() < 3.0
    if uniform_share < 1:
        # Cells hold about equally many inputs.
        assert isinstance(layer.basis, BSpline)
        cell = torch.searchsorted(
            layer.basis.grid.expand(IN, -1)[:, 1:-1].contiguous(), x.T.contiguous()
        )
        counts = torch.stack([c.bincount(minlength=8) for c in cell])
        assert counts.min() > 300


def test_a_refits_matrix_moves_the_optimizer_along() -> None:
    """The direction after a refit is the refitted direction, although entries are negative."""
    layer, moments, _ = trained(1)
    refit = refit_layer(layer, BSpline(grid_size=9).double(), torch.randn(500, IN))
    assert (refit.matrix < 0).any()
    mean, square = refine_moments(refit.matrix, *moments, eps=0.0)
    direction = moments[0] / moments[1].sqrt()
    torch.testing.assert_close(mean / square.sqrt(), refit.matrix @ direction)


def test_impossible_adaptations_are_refused() -> None:
    layer, x = KANLinear(2, 2, basis=BSpline()), torch.randn(50, 2)
    for options, message in (
        ({"tail": 0.5}, "tail = 0.5"),
        ({"margin": -0.1}, "margin = -0.1"),
        ({"uniform_share": 1.5}, "uniform_share = 1.5"),
        ({"uniform_share": 0.5}, "equally wide"),
    ):
        with pytest.raises(ValueError, match=message):
            adapt_layer(layer, x, **options)
    with pytest.raises(ValueError, match="finite"):
        adapt_layer(layer, torch.full((3, 2), math.nan))
    with pytest.raises(ValueError, match="at least one"):
        adapt_layer(layer, x[:0])
    with pytest.raises(ValueError, match="fourier3"):
        adapt_layer(KANLinear(2, 2, basis=Fourier()), x)
    with pytest.raises(ValueError, match="3 channels"):
        refit_layer(layer, Rational(3), x)
    with pytest.raises(ValueError, match="finite"):
        refit_layer(layer, BSpline(grid_size=9), torch.full((3, 2), math.nan))
    for change in (adapt_layer, lambda layer, x: refit_layer(layer, BSpline(grid_size=9), x)):
        with pytest.raises(ValueError, match="inputs have 4 channels, and in_features = 2"):
            change(layer, torch.randn(50, 4))


def test_refitted_layers_train() -> None:
    layer = nn.Sequential(KANLinear(2, 3, basis=BSpline()), KANLinear(3, 1, basis=BSpline()))
    x = torch.randn(40, 2)
    first = layer[1]
    assert isinstance(first, KANLinear)
    adapt_layer(first, layer[0](x))
    layer(x).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
