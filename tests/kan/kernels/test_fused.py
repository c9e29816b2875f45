"""Triton's kernels, interpreted where there is no GPU, against formulas in float64.

The interpreter takes a tenth of a second a tile, of 16 × 16, so shapes are small: most have two
tiles each way, the second not full. It rounds to bfloat16 by cutting off, twice as far as a GPU.
"""

import copy
import sys
from typing import Any

import numpy as np
import pytest
import scipy.interpolate
import scipy.special
import torch
from benchmarking.measure import saved_bytes

from kanlm.kan import BSpline, Chebyshev, Hermite, KANLinear, Legendre
from kanlm.kan.kernels import edge_sums, fused, use_backend

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="there is no triton but for Linux"
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INPUTS, OUTPUTS = 18, 17


def draw(*shape: int, dtype=torch.float32, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator)).to(DEVICE, dtype)


def make(basis, base=None, *, inputs=INPUTS, outputs=OUTPUTS, dtype=torch.float32) -> KANLinear:
    torch.manual_seed(0)
    return KANLinear(inputs, outputs, basis=basis, base=base).to(DEVICE, dtype)


def run(layer: KANLinear, x: torch.Tensor) -> torch.Tensor:
    with use_backend("triton"):
        return layer(x)


def gradients(layer: torch.nn.Module, x: torch.Tensor, backend) -> list[torch.Tensor]:
    """The outputs, and the gradients of x and of all parameters."""
    x = x.detach().requires_grad_()
    with use_backend(backend):
        y = layer(x)
    dy = draw(*y.shape, dtype=torch.bfloat16, seed=1).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], dy)]


@pytest.mark.parametrize(
    ("basis", "functions"),
    [
        (
            Hermite(degree=3),
            lambda x: [
                scipy.special.eval_hermitenorm(n, 3 * np.tanh(x / 3))
                / np.sqrt(scipy.special.factorial(n))
                for n in (1, 2, 3)
            ],
        ),
        (
            Chebyshev(degree=3, constant=True, half_width=2.0),
            lambda x: [scipy.special.eval_chebyt(n, np.tanh(x / 2)) for n in range(4)],
        ),
        (
            Legendre(degree=2, half_width=9.0, outside="linear"),
            lambda x: [np.sqrt(2 * n + 1) * scipy.special.eval_legendre(n, x / 9) for n in (1, 2)],
        ),
        (
            BSpline(grid_size=3, grid_range=(-2, 4)),
            lambda x: [np.interp(x, [-2, 0, 2, 4], row) for row in np.eye(4)],
        ),
        *(
            (
                BSpline(grid_size=3, degree=degree, grid_range=(-2, 4)),
                lambda x, degree=degree: [
                    scipy.interpolate.BSpline(
                        np.arange(-degree, 4 + degree) * 2 - 2.0, row, degree
                    )(x)
                    for row in np.eye(3 + degree)
                ],
            )
            for degree in (0, 2, 3)
        ),
    ],
    ids=lambda value: getattr(value, "label", ""),
)
def test_sums_are_those_of_independent_formulas(basis, functions) -> None:
    coefficients = draw(INPUTS, basis.num_functions, OUTPUTS, scale=1.0)
    # Within the range of all of them.
    x = draw(20, INPUTS, seed=1, scale=1.0).clamp(-2, 4)
    values = np.stack(functions(x.double().cpu().numpy()), axis=-1)
    expected = np.einsum("nib,ibo->no", values, coefficients.double().cpu().numpy())
    with use_backend("triton"):
        got = edge_sums(x, coefficients, basis.to(DEVICE))
    np.testing.assert_allclose(got.cpu().numpy(), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("basis", "base"),
    [
        (Hermite(), None),
        (Hermite(degree=2, constant=True, outside="linear"), "identity"),
        (Chebyshev(degree=5), None),
        (Legendre(degree=1, outside="linear"), "silu"),
        (BSpline(), "silu"),
        *((BSpline(grid_size=cells), None) for cells in (1, 2, 3)),
        (BSpline(degree=0), "identity"),
        (BSpline(degree=2), None),
        (BSpline(degree=3), "silu"),
        *((BSpline(grid_size=1, degree=degree), None) for degree in (2, 3)),
    ],
    ids=lambda value: getattr(value, "label", str(value)),
)
def test_values_and_gradients_agree_with_the_dense_contraction(basis, base) -> None:
    """In the tails, at knots and at the ends of the range too."""
    layer = make(basis, base)
    x = draw(3, 7, INPUTS)
    x[0, :, :6] = x[0, :, :6].round()
    x[1, 0, 0], x[1, 0, 1] = basis.ends[0]
    exact = copy.deepcopy(layer).double()
    torch.testing.assert_close(
        [each.double() for each in gradients(layer, x, "triton")],
        gradients(exact, x.double(), "reference"),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize(
    ("dtype", "unit"),
    [(torch.bfloat16, 2**-7 if DEVICE == "cpu" else 2**-8), (torch.float16, 2**-11)],
)
@pytest.mark.parametrize(
    ("basis", "base"), [(Hermite(), None), (BSpline(), "silu"), (BSpline(degree=3), "silu")]
)
def test_rounding_in_halves_is_bounded(basis, base, dtype, unit) -> None:
    """Functions are rounded once and results once; sums between them are exact to float32."""
    layer = make(basis, base, dtype=dtype)
    x = draw(20, INPUTS, dtype=dtype)
    exact = copy.deepcopy(layer).double()
    y, dx, dc, *others = gradients(layer, x, "triton")
    expected = gradients(exact, x.double(), "reference")
    assert {each.dtype for each in (y, dx, dc, *others)} == {dtype}

    def check(got, expected, terms) -> None:
        bound = unit * (terms + expected.abs()) + 1e-4
        assert ((got.double() - expected).abs() <= bound).all()

    values = exact.basis.values(x.double()).abs()
    terms = torch.einsum("nib,ibo->no", values, exact.coefficients.abs())
    if base is not None:
        assert exact.base_weight is not None
        terms += torch.nn.functional.silu(x.double()).abs() @ exact.base_weight.abs().T
    check(y, expected[0], terms)
    check(dx, expected[1], 0)
    dy = draw(*y.shape, dtype=torch.bfloat16, seed=1).double().abs()
    check(dc, expected[2], torch.einsum("nib,no->ibo", values, dy))


def test_autocast_multiplies_in_its_dtype_and_keeps_gradients_exact() -> None:
    layer, x = make(BSpline(), "silu"), draw(20, INPUTS)
    exact = gradients(copy.deepcopy(layer).double(), x.double(), "reference")
    with torch.autocast(DEVICE, torch.bfloat16):
        found = gradients(layer, x, "triton")
    assert [each.dtype for each in found] == [torch.bfloat16, *[torch.float32] * 3]
    for got, expected in zip(found, exact, strict=True):
        assert (got.double() - expected).norm() < 2**-6 * expected.norm()


def test_several_parts_of_the_tokens_add_up(monkeypatch) -> None:
    from kanlm.kan.kernels import triton_launches

    layer, x = make(Hermite(degree=1), inputs=3, outputs=2), draw(150, 3)
    monkeypatch.setattr(triton_launches, "_parts", lambda *shape: 2)
    torch.testing.assert_close(
        gradients(layer, x, "triton"), gradients(layer, x, "reference"), rtol=1e-4, atol=1e-4
    )


def test_no_token_at_all() -> None:
    layer = make(BSpline(), "silu")
    y, *found = gradients(layer, draw(2, 0, INPUTS), "triton")
    assert y.shape == (2, 0, OUTPUTS)
    for got, tensor in zip(found, [draw(2, 0, INPUTS), *layer.parameters()], strict=True):
        torch.testing.assert_close(got, torch.zeros_like(tensor))


@pytest.mark.parametrize(
    "basis", [Hermite(), Hermite(outside="linear"), BSpline(), BSpline(degree=3)]
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_inputs_that_are_no_numbers_spoil_their_token_alone(basis, value) -> None:
    layer, x = make(basis, inputs=3, outputs=2), draw(3, 3)
    alone = run(layer, x)
    x[1, 1] = value
    got = run(layer, x)
    torch.testing.assert_close(got[::2], alone[::2])
    with use_backend("reference"):
        expected = layer(x)
    assert torch.isfinite(got).tolist() == torch.isfinite(expected).tolist()


@pytest.mark.parametrize(("basis", "base"), [(Hermite(), None), (BSpline(grid_size=2), "silu")])
def test_operators_keep_torchs_rules(basis, base) -> None:
    """Schemas, fake kernels and registered gradients, also for any number of tokens."""
    layer = make(basis, base, inputs=3, outputs=2)
    formula = fused.triton_formula(layer.basis)
    assert formula is not None
    x = draw(5, 3).requires_grad_()
    tensors = (x, layer.coefficients, layer.base_weight, formula.knots)
    rest = (formula.name, formula.numbers, base or "none", torch.float32)
    torch.library.opcheck(fused._sums, (*tensors, *rest))
    # Their own gradients are refused.
    given = [None if each is None else each.detach() for each in tensors]
    for operator in (fused._input_gradients, fused._coefficient_gradients):
        torch.library.opcheck(operator, (draw(5, 2), *given, *rest))


@pytest.mark.parametrize(
    ("basis", "base", "autocast"), [(Hermite(), None, False), (BSpline(), "silu", True)]
)
def test_compiled_code_has_no_break(basis, base, autocast) -> None:
    layer, x = make(basis, base, inputs=3, outputs=2), draw(5, 3)
    compiled: Any = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        eager = gradients(layer, x, "triton")
        found = gradients(compiled, x, "triton")
    torch.testing.assert_close(found, eager, rtol=0, atol=0)


@pytest.mark.parametrize(("basis", "base"), [(Hermite(), None), (BSpline(), "silu")])
def test_nothing_is_kept_for_backward(basis, base) -> None:
    layer, x = make(basis, base), draw(20, INPUTS).requires_grad_()
    assert saved_bytes(lambda x: run(layer, x), x, layer) == 0
    with torch.autocast(DEVICE, torch.bfloat16):
        assert saved_bytes(lambda x: run(layer, x), x, layer) == 0


def test_only_gradients_that_are_asked_for_are_computed(monkeypatch) -> None:
    from kanlm.kan.kernels import triton_launches

    def refuse(*arguments) -> None:
        raise AssertionError("nobody asked")

    layer, x = make(Hermite(), inputs=3, outputs=2), draw(5, 3)
    with monkeypatch.context() as patched:
        patched.setattr(triton_launches, "input_gradients", refuse)
        run(layer, x).sum().backward()
    assert layer.coefficients.grad is not None
    layer.requires_grad_(False)
    monkeypatch.setattr(triton_launches, "coefficient_gradients", refuse)
    run(layer, x.requires_grad_()).sum().backward()
    assert x.grad is not None


def test_second_derivatives_are_refused_by_name() -> None:
    layer, x = make(Hermite(), inputs=3, outputs=2), draw(5, 3).requires_grad_()
    (dx,) = torch.autograd.grad(run(layer, x).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"use_backend\('recompute'\) has"):
        dx.sum().backward()


def test_a_grid_that_moves_is_read_when_kernels_run() -> None:
    layer, x = make(BSpline(), "silu", inputs=3, outputs=2), draw(5, 3)
    run(layer, x)
    grid = torch.linspace(-1, 5, 7).unsqueeze(0)
    assert isinstance(layer.basis, BSpline)
    layer.basis = layer.basis.with_grid(grid.to(DEVICE))
    torch.testing.assert_close(
        gradients(layer, x, "triton"), gradients(layer, x, "reference"), rtol=1e-4, atol=1e-4
    )
