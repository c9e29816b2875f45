"""The clamped sum against numpy's interpolation and against the dense contraction."""

import functools

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from kanlm.kan import BSpline
from kanlm.kan.kernels import edge_sums, use_backend
from kanlm.kan.kernels.piecewise_linear import contract_piecewise_linear

KNOTS = torch.tensor([-2.0, -0.5, 0.25, 1.0, 3.0], dtype=torch.float64)


def piecewise_linear(x, coefficients, basis):
    with use_backend("piecewise-linear"):
        return edge_sums(x, coefficients, basis)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_interpolates_on_uneven_knots() -> None:
    values = draw(3, 5, 2)
    x = torch.cat([draw(40, 3).clamp(-2, 3), KNOTS[:, None].expand(-1, 3)])
    expected = sum(
        np.stack([np.interp(x[:, i], KNOTS, values[i, :, o]) for o in range(2)], axis=-1)
        for i in range(3)
    )
    got = contract_piecewise_linear(x, KNOTS, values)
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("shape", [(3,), (7, 3), (2, 4, 3), (0, 3)])
@pytest.mark.parametrize("grid_size", [1, 2, 6])
def test_agrees_with_the_dense_contraction(shape: tuple[int, ...], grid_size: int) -> None:
    """Values and all gradients, at knots and in the tails too."""
    basis = BSpline(grid_size=grid_size).double()
    coefficients = draw(3, basis.num_functions, 5, seed=1).requires_grad_()
    x = 3 * draw(*shape)
    x.view(-1)[: x.numel() // 2] = x.view(-1)[: x.numel() // 2].round()
    x.requires_grad_()
    fast = piecewise_linear(x, coefficients, basis)
    dense = basis.contract(x, coefficients)
    weight = draw(*dense.shape, seed=2)
    torch.testing.assert_close(fast, dense, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(fast, (x, coefficients), weight),
        torch.autograd.grad(dense, (x, coefficients), weight),
        rtol=1e-11,
        atol=1e-11,
    )


def test_gradcheck() -> None:
    x = torch.tensor([[-3.1, -0.7, 0.3], [1.7, 2.2, 3.4]], dtype=torch.float64)
    values = draw(3, 5, 2)
    assert gradcheck(
        lambda x, values: contract_piecewise_linear(x, KNOTS, values),
        (x.requires_grad_(), values.requires_grad_()),
    )


def test_gradients_of_gradients() -> None:
    """Also of a sum, whose gradient at the outputs is constant."""
    x = torch.tensor([[-3.1, -0.7, 0.3], [1.7, 2.2, 3.4]], dtype=torch.float64).requires_grad_()
    values = draw(3, 5, 2).requires_grad_()
    assert gradgradcheck(lambda x, v: contract_piecewise_linear(x, KNOTS, v), (x, values))
    basis, y = BSpline(grid_size=4).double(), []
    for contract in (basis.contract, functools.partial(piecewise_linear, basis=basis)):
        (slope,) = torch.autograd.grad(contract(x, values).sum(), x, create_graph=True)
        y.append(torch.autograd.grad(slope.square().sum(), values)[0])
    assert y[0].abs().sum() > 0
    torch.testing.assert_close(*y, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x, v: torch.func.jacrev(f, argnums=(0, 1))(x[0], v),
        lambda f, x, v: torch.func.jacrev(torch.func.jacrev(f), argnums=1)(x[0], v),
        lambda f, x, v: torch.func.vmap(torch.func.jacrev(f, argnums=1), (0, None))(x, v),
        lambda f, x, v: torch.func.vmap(f)(x, v.expand(6, -1, -1, -1)),
    ],
)
def test_function_transforms(transform) -> None:
    """As of the dense contraction: Jacobians, those of Jacobians, and those of single inputs."""
    basis = BSpline(grid_size=4).double()
    fast = functools.partial(piecewise_linear, basis=basis)
    x, values = 2 * draw(6, 3), draw(3, 5, 2)
    torch.testing.assert_close(
        transform(fast, x, values), transform(basis.contract, x, values), rtol=1e-11, atol=1e-11
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_knot_that_no_input_is_near_gets_no_gradient_at_all(dtype):
    """A rounding error there would be a full step to AdamW."""
    knots = torch.linspace(-3, 3, 7, dtype=dtype)
    x = torch.rand(50, 8, dtype=dtype) * 0.9 + 0.05
    values = torch.randn(8, 7, 5, dtype=dtype, requires_grad=True)
    contract_piecewise_linear(x, knots, values).square().sum().backward()
    assert values.grad is not None
    touched = (values.grad != 0).any(dim=-1).any(dim=0)
    assert touched.tolist() == [False, False, False, True, True, False, False]
