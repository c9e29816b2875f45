"""Recomputed sums against the plain formula: values, gradients of all orders, transforms."""

import pytest
import torch
from benchmarking.measure import saved_bytes
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from kanlm.kan import RBF, BSpline, Chebyshev, Fourier, Hermite, KANLinear, Legendre
from kanlm.kan.kernels import recompute, use_backend
from kanlm.kan.kernels.recompute import contract_recomputing

BASES = [
    Hermite(degree=3),
    Hermite(degree=2, constant=True, outside="squash"),
    Chebyshev(degree=4),
    Legendre(degree=3, outside="linear"),
    Fourier(frequencies=2),
    RBF(centers=5),
    BSpline(degree=3),
]
every_basis = pytest.mark.parametrize("basis", BASES, ids=lambda basis: basis.label)


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


@every_basis
@pytest.mark.parametrize("shape", [(3,), (0, 3), (50, 3), (2, 25, 3)])
def test_agrees_with_the_formula(basis, shape, monkeypatch) -> None:
    """In several blocks, in the tails, and at both ends of the range."""
    monkeypatch.setattr(recompute, "_CPU_BLOCK", 16)
    basis = basis.double()
    x = draw(*shape, scale=4)
    x.view(-1)[:2] = basis.ends[0].clamp(-9, 9)[: x.numel()]
    x.requires_grad_()
    coefficients = draw(3, basis.num_functions, 5, seed=1).requires_grad_()
    got = contract_recomputing(x, coefficients, basis)
    expected = basis.contract(x, coefficients)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    dy = draw(*expected.shape, seed=2)
    torch.testing.assert_close(
        torch.autograd.grad(got, (x, coefficients), dy),
        torch.autograd.grad(expected, (x, coefficients), dy),
        rtol=1e-11,
        atol=1e-11,
    )


@every_basis
@pytest.mark.parametrize("base", [None, "silu", "identity"])
def test_gradients_of_both_orders(basis, base) -> None:
    basis = basis.double()
    x = draw(4, 3, scale=2).requires_grad_()
    weights = [draw(3, basis.num_functions, 2, seed=1).requires_grad_()]
    if base is not None:
        weights.append(draw(2, 3, seed=2).requires_grad_())

    def contract(x, coefficients, base_weight=None):
        return contract_recomputing(x, coefficients, basis, base, base_weight)

    assert gradcheck(contract, (x, *weights))
    assert gradgradcheck(contract, (x, *weights))


@every_basis
@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x, c: torch.func.jacrev(f, argnums=(0, 1))(x[0], c),
        lambda f, x, c: torch.func.jacfwd(f, argnums=(0, 1))(x[0], c),
        lambda f, x, c: torch.func.vmap(torch.func.jacrev(f, argnums=1), (0, None))(x, c),
        lambda f, x, c: torch.func.vmap(f)(x, c.expand(6, -1, -1, -1)),
        lambda f, x, c: torch.func.jvp(f, (x, c), (x.cos(), c.sin())),
    ],
)
def test_function_transforms(basis, transform) -> None:
    """With a base, too."""
    basis = basis.double()
    x, coefficients = draw(6, 3, scale=2), draw(3, basis.num_functions, 5, seed=1)
    base_weight = draw(5, 3, seed=2)

    def contract(x, c):
        return contract_recomputing(x, c, basis, "silu", base_weight)

    def expected(x, c):
        return basis.contract(x, c) + F.linear(F.silu(x), base_weight)

    torch.testing.assert_close(
        transform(contract, x, coefficients),
        transform(expected, x, coefficients),
        rtol=1e-10,
        atol=1e-10,
    )


def test_a_knot_that_no_input_is_near_gets_no_gradient_at_all() -> None:
    """A rounding error there would be a full step to AdamW."""
    layer = KANLinear(8, 5, basis=BSpline(grid_size=6))
    layer(torch.rand(50, 8) * 0.9 + 0.05).square().sum().backward()
    assert layer.coefficients.grad is not None
    touched = (layer.coefficients.grad != 0).any(dim=-1).any(dim=0)
    assert touched.tolist() == [False, False, False, True, True, False, False]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("basis", [Hermite(), BSpline(), BSpline(degree=2), Chebyshev()])
@pytest.mark.parametrize("base", ["silu", None])
def test_nothing_of_the_expansion_is_kept(basis, base, compiled) -> None:
    """Exact counts: nothing but the input, where autograd alone keeps several expansions."""
    layer = KANLinear(16, 24, basis=basis, base=base)
    x = torch.randn(64, 16, requires_grad=True)
    with use_backend("reference"):
        assert saved_bytes(layer, x, layer) >= 64 * 16 * 4 * basis.num_functions
    run = torch.compile(layer, fullgraph=True) if compiled else layer
    # The knots' float32 copy and the like are bytes, not activations.
    assert saved_bytes(run, x, layer) <= 256


def test_autocast_multiplies_in_its_dtype() -> None:
    layer = KANLinear(16, 24)
    x = torch.randn(64, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        with use_backend("reference"):
            expected = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=2**-7, atol=1e-3)
    y.float().square().sum().backward()
    grad = layer.coefficients.grad
    assert grad is not None
    layer.zero_grad()
    layer(x).square().sum().backward()
    assert layer.coefficients.grad is not None
    difference = (grad - layer.coefficients.grad).norm() / layer.coefficients.grad.norm()
    assert difference < 2**-6


def test_inputs_without_gradient_get_none() -> None:
    layer, x = KANLinear(3, 2), torch.randn(5, 3)
    layer(x).sum().backward()
    assert layer.coefficients.grad is not None
    layer.requires_grad_(False)
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
