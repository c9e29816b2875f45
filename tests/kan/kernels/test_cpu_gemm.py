"""Products with the basis inside, compiled from C++, against the plain formula in float64."""

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kanlm.kan import RBF, BSpline, Chebyshev, Hermite, KANLinear, Legendre, cpp_build
from kanlm.kan.base_functions import BaseFunction
from kanlm.kan.bases import Differentiable
from kanlm.kan.bases.cpp_formulas import CppFormulas
from kanlm.kan.kernels import cpu_gemm, use_backend

pytestmark = pytest.mark.skipif(
    cpp_build.obstacle() is not None or platform.machine() != "x86_64",
    reason=f"no native kernels here: {cpp_build.obstacle() or platform.machine()}",
)

BASES: list[Differentiable] = [
    Hermite(),
    Hermite(degree=9, outside="linear"),
    Chebyshev(degree=2, constant=True),
    Legendre(degree=1),
    RBF(centers=5),
    BSpline(),
    BSpline(degree=3, grid_size=40),
    BSpline(degree=2, equal_cells=False),
]


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def gradients(layer: KANLinear, x: Tensor, dy: Tensor) -> list[Tensor]:
    """The outputs, and gradients of the inputs and of all parameters."""
    x = x.detach().requires_grad_()
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], dy)]


def formulas_of(layer: KANLinear) -> CppFormulas:
    assert isinstance(layer.basis, Differentiable)
    formulas = layer.basis.cpp_formulas()
    assert formulas is not None
    return formulas


def check(layer: KANLinear, x: Tensor) -> None:
    """All of them, each to the rounding of sums of as many numbers, beside float64's. Where terms
    cancel, that of the plain formula in float32 says what is left of the digits."""
    dy = torch.randn(*x.shape[:-1], layer.out_features)
    assert cpu_gemm.can(formulas_of(layer), x, layer.coefficients, layer.base_weight)
    got = gradients(layer, x, dy)
    with use_backend("reference"):
        plain = gradients(layer, x, dy)
        expected = gradients(layer.double(), x.double(), dy.double())
    for found, rounded, exact in zip(got, plain, expected, strict=True):
        scale = exact.abs().max().clamp(min=1e-3)
        tolerance = 2e-5 + 4 * ((rounded - exact).abs().max() / scale).item()
        torch.testing.assert_close(found.double() / scale, exact / scale, rtol=0, atol=tolerance)


@settings(max_examples=60)
@given(
    basis=st.sampled_from(BASES),
    base=st.sampled_from([None, "silu", "identity"]),
    tokens=st.integers(1, 40),
    inputs=st.integers(1, 70),
    outputs=st.integers(1, 50),
    threads=st.integers(1, 5),
    seed=st.integers(0, 2**32),
)
def test_agrees_with_the_formula(
    basis: Differentiable,
    base: Any,
    tokens: int,
    inputs: int,
    outputs: int,
    threads: int,
    seed: int,
) -> None:
    """For sizes that fill no tile, panel or slice, and for more threads than there is to do."""
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    check(
        KANLinear(inputs, outputs, basis=basis.float(), base=base), 2 * torch.randn(tokens, inputs)
    )


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs"),
    [
        (700, 40, 33),  # several blocks of tokens
        (1, 700, 24),  # several slices
        (300, 341, 100),  # both, the slices unlike
        (40, 24, 1100),  # more outputs than a tile adds up
        (1200, 3, 2),  # threads that share a slice's tokens
    ],
)
def test_more_than_one_block(tokens: int, inputs: int, outputs: int, threads: int) -> None:
    torch.set_num_threads(threads)
    cases: list[tuple[Differentiable, BaseFunction | None]] = [
        (BSpline(), "silu"),
        (Hermite(), None),
    ]
    for basis, base in cases:
        check(KANLinear(inputs, outputs, basis=basis, base=base), torch.randn(tokens, inputs))


def test_leading_dimensions_and_strange_layouts() -> None:
    layer = KANLinear(12, 9, base="silu")
    check(layer, torch.randn(2, 3, 12))
    layer = KANLinear(12, 9, base="silu")
    check(layer, torch.randn(12, 30).T)
    layer = KANLinear(12, 9, base="silu")
    layer.coefficients.data = torch.randn(9, 3, 12).permute(2, 1, 0)
    check(layer, torch.randn(30, 12))


def test_a_token_does_not_depend_on_those_beside_it() -> None:
    layer = KANLinear(100, 30, basis=BSpline())
    x = torch.randn(500, 100)
    y = layer(x)
    assert torch.equal(layer(x[:1]), y[:1])
    assert torch.equal(layer(x[143:150]), y[143:150])
    x[10, 3] = float("nan")
    broken = layer(x).isnan().any(dim=1)
    assert broken.nonzero().flatten().tolist() == [10]


@pytest.mark.parametrize("needs", [(True, False), (False, True), (True, True)])
def test_only_what_is_asked_for(needs: tuple[bool, bool]) -> None:
    layer = KANLinear(20, 7, base="silu")
    x, dy = torch.randn(50, 20), torch.randn(50, 7)
    given = formulas_of(layer), dy, x, layer.coefficients.detach(), layer.base_weight, "silu"
    found = cpu_gemm.gradients(*given, needs)
    every = cpu_gemm.gradients(*given, (True, True))
    for one, each, need in zip(found, every, (needs[0], needs[1], needs[1]), strict=True):
        assert (one is not None) == need
        assert one is None or (each is not None and torch.equal(one, each))


def test_compiled_code_calls_it_without_a_break() -> None:
    """For every file of formulas. Equal cells' knots are rounded otherwise, but for which it
    computes the very same."""
    cases: list[tuple[Differentiable, BaseFunction | None]] = [
        (Hermite(), None),
        (BSpline(degree=2), "silu"),
        (RBF(), "identity"),
    ]
    for basis, base in cases:
        torch.compiler.reset()
        layer = KANLinear(20, 12, basis=basis, base=base, bias=False)
        compiled: Any = torch.compile(layer, fullgraph=True)
        x, dy = torch.randn(3, 50, 20), torch.randn(3, 50, 12)
        for got, expected in zip(gradients(compiled, x, dy), gradients(layer, x, dy), strict=True):
            tolerance = 1e-5 if isinstance(basis, BSpline) else 0
            torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def test_what_it_cannot_take_is_left_to_torch() -> None:
    formulas = formulas_of(KANLinear(8, 5))
    x, coefficients = torch.randn(4, 8), torch.randn(8, 3, 5)
    assert cpu_gemm.can(formulas, x, coefficients, None)
    assert not cpu_gemm.can(formulas, x[:0], coefficients, None)
    assert not cpu_gemm.can(formulas, x.double(), coefficients, None)
    assert not cpu_gemm.can(formulas, x, coefficients.bfloat16(), None)
    assert not torch.func.vmap(
        lambda row: torch.tensor(cpu_gemm.can(formulas, row.unsqueeze(0), coefficients, None))
    )(x).any()
    with pytest.raises(ValueError, match="x has 8 channels: expected 9"):
        cpu_gemm.sums(formulas, x, torch.randn(9, 3, 5), None, None)


def test_weights_that_do_not_fit_are_refused() -> None:
    """They would be read, and the functions' values written, past their ends."""
    layer, x = KANLinear(8, 5, basis=BSpline(), base="silu"), torch.randn(70, 8)
    layer.base_weight = torch.nn.Parameter(torch.randn(2, 8))
    with pytest.raises(ValueError, match=r"base_weight of shape \(2, 8\): expected \(5, 8\)"):
        layer(x)
    layer.base_weight = None
    with pytest.raises(ValueError, match=r"base_weight of shape None: expected \(5, 8\)"):
        layer(x)
    layer = KANLinear(8, 5, basis=BSpline())
    layer.basis = BSpline(grid_size=12)
    with pytest.raises(ValueError, match="coefficients of 7 functions: the basis has 13"):
        layer(x)


def test_weights_of_a_base_that_was_taken_away_get_no_gradient() -> None:
    layer, x = KANLinear(8, 5, basis=BSpline(), base="silu"), torch.randn(70, 8)
    layer.base = None
    layer(x).sum().backward()
    assert layer.base_weight is not None
    assert layer.base_weight.grad is None


def test_compiled_code_does_not_read_weights_of_another_type() -> None:
    torch.compiler.reset()
    layer = KANLinear(8, 5, base="silu")
    assert layer.base_weight is not None
    layer.base_weight.data = layer.base_weight.data.bfloat16()
    with pytest.raises(RuntimeError, match="same dtype"):
        torch.compile(layer)(torch.randn(70, 8))


def test_compiled_tangents_are_those_of_eager_code() -> None:
    torch.compiler.reset()
    layer, x = KANLinear(8, 5), torch.randn(70, 8)

    def tangent(x: Tensor) -> Tensor:
        return torch.func.jvp(layer, (x,), (torch.ones_like(x),))[1]

    torch.testing.assert_close(torch.compile(tangent)(x), tangent(x), rtol=1e-5, atol=1e-5)


def test_a_negated_view_is_not_read_as_it_lies() -> None:
    layer, x = KANLinear(8, 5), torch.randn(70, 8)
    torch.testing.assert_close(layer(torch.ops.aten._neg_view(x)), layer(-x), rtol=1e-5, atol=1e-5)


def test_no_memory_is_an_error_of_pythons() -> None:
    code = (
        "import resource, torch; from kanlm.kan import KANLinear; torch.set_num_threads(1)\n"
        "layer, x = KANLinear(512, 4096).requires_grad_(False), torch.randn(100, 512)\n"
        "KANLinear(2, 2)(torch.randn(100, 2)).sum().backward()\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**23, used + 2**23))\n"
        "try: layer(x)\n"
        "except MemoryError as error: print(error)"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert "no memory for the weights of a KAN layer" in done.stdout, done.stderr
