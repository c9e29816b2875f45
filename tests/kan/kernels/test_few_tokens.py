"""Sums for a few tokens, compiled from C++ and through torch, against the dense formula."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kanlm.kan import (
    RBF,
    BSpline,
    Chebyshev,
    Fourier,
    Hermite,
    Implicit,
    KANLinear,
    Legendre,
    Rational,
    Wavelet,
    adapt_layer,
    cpp_build,
    decoding,
)
from kanlm.kan.bases import Basis, Local
from kanlm.kan.kernels import few_sums, few_tokens, use_backend

native_only = pytest.mark.skipif(
    cpp_build.obstacle() is not None, reason=f"no native kernels: {cpp_build.obstacle()}"
)


@pytest.fixture(params=["native", "torch"])
def way(request, monkeypatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(few_tokens, "_functions", dict)
    elif cpp_build.obstacle():
        pytest.skip(f"no native kernels: {cpp_build.obstacle()}")
    return request.param


def dense(layer: KANLinear, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), use_backend("reference"):
        return layer(x)


def few(layer: KANLinear, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return few_sums(x, layer.edges())


@pytest.mark.parametrize("degree", range(6))
@pytest.mark.parametrize("base", ["silu", "identity", None])
@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_every_degree_and_base(way, degree, base, tokens) -> None:
    """Also in the tails, at knots, and for widths that no block of the kernel divides."""
    basis = BSpline(degree=degree, grid_size=5)
    layer = KANLinear(13, 19, basis=basis, base=base, bias=True)
    torch.nn.init.normal_(layer.bias)  # pyright: ignore[reportArgumentType]
    x = 3 * torch.randn(tokens, 13)
    x[0, :6] = basis.grid[0]
    torch.testing.assert_close(few(layer, x), dense(layer, x), rtol=1e-5, atol=2e-6)


@native_only
@settings(max_examples=40)
@given(
    st.integers(0, 5),
    st.integers(1, 9),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 70),
    st.integers(0, 2**16),
)
def test_any_shape(degree, grid_size, inputs, out, tokens, seed) -> None:
    torch.manual_seed(seed)
    layer = KANLinear(inputs, out, basis=BSpline(degree=degree, grid_size=grid_size))
    x = 2 * torch.randn(tokens, inputs)
    torch.testing.assert_close(few(layer, x), dense(layer, x), rtol=1e-5, atol=5e-6)


def test_grids_that_moved(way) -> None:
    """Another range, a grid a channel, and free knots."""
    x = torch.randn(300, 6) * torch.arange(1, 7) / 3 + 1
    for basis in (
        BSpline(),
        BSpline(6, per_channel=True, degree=2),
        BSpline(equal_cells=False, degree=3),
    ):
        layer = KANLinear(6, 5, basis=basis)
        adapt_layer(layer, x, uniform_share=1.0 if basis.equal_cells else 0.5)
        torch.testing.assert_close(few(layer, x[:3]), dense(layer, x[:3]), rtol=1e-5, atol=5e-6)


def test_bfloat16_is_rounded_once(way) -> None:
    """Native sums are those of float32, rounded to the nearest at the end."""
    layer = KANLinear(64, 48, bias=True, basis=BSpline()).bfloat16()
    x = torch.randn(3, 64).bfloat16()
    got = few(layer, x)
    assert got.dtype == torch.bfloat16
    wide = KANLinear(64, 48, bias=True, basis=BSpline())
    wide.load_state_dict(layer.state_dict())
    expected = dense(wide, x.float())
    if way == "native":
        assert ((got - expected).abs() <= 2**-8 * expected.abs() + 1e-6).all()
    else:
        torch.testing.assert_close(got.float(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_that_are_no_numbers_do_no_harm(way, value, dtype) -> None:
    """They spoil the outputs of their token alone, and read nothing outside the table."""
    layer = KANLinear(6, 5, basis=BSpline()).to(dtype)
    x = torch.randn(2, 6).to(dtype)
    x[0, 2] = value
    got = few(layer, x)
    torch.testing.assert_close(got[1], few(layer, x[1:])[0])
    if not torch.isfinite(torch.tensor(value)):
        assert not torch.isfinite(got[0]).any()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads(way, threads) -> None:
    layer, x = KANLinear(7, 30, basis=BSpline()), torch.randn(2, 7)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.testing.assert_close(few(layer, x), dense(layer, x), rtol=1e-5, atol=2e-6)
    finally:
        torch.set_num_threads(before)


def test_a_table_that_does_not_lie_in_order(way) -> None:
    layer = KANLinear(6, 5, basis=BSpline())
    layer.coefficients = torch.nn.Parameter(
        layer.coefficients.detach().transpose(0, 2).contiguous().transpose(0, 2)
    )
    x = torch.randn(2, 6)
    torch.testing.assert_close(few(layer, x), dense(layer, x), rtol=1e-5, atol=2e-6)


def test_no_token_at_all(way) -> None:
    assert few(KANLinear(6, 5, basis=BSpline()), torch.empty(0, 6)).shape == (0, 5)


BASES = [
    Hermite(),
    Hermite(constant=True, outside="linear"),
    Chebyshev(degree=7),
    Legendre(degree=2),
    RBF(),
    RBF(shape="hat"),
    Fourier(),
    Wavelet(13),
    Rational(13),
    Implicit(),
    BSpline(grid_size=1),
]


@pytest.mark.parametrize("basis", BASES, ids=lambda basis: basis.label)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bases_that_are_not_local(way, basis: Basis, dtype) -> None:
    """For every number of tokens that a tile of the kernel can leave over, also in the tails."""
    layer = KANLinear(13, 37, basis=copy.deepcopy(basis), bias=True)
    torch.nn.init.normal_(layer.bias)  # pyright: ignore[reportArgumentType]
    layer = layer.to(dtype)
    exact = copy.deepcopy(layer).double()
    for tokens in (1, 2, 3, 5, 8, 15, 64):
        x = (2 * torch.randn(tokens, 13)).to(dtype)
        got, expected = few(layer, x), dense(exact, x.double())
        assert got.dtype == dtype
        # In bfloat16 values of functions may be rounded, and the sum is at the end.
        bound = 2e-6 if dtype == torch.float32 else 2**-6
        assert (got - expected).abs().max() <= bound * expected.abs().max()


@native_only
@settings(max_examples=30)
@given(
    st.integers(1, 9), st.integers(1, 40), st.integers(1, 40), st.integers(1, 70), st.integers(0, 9)
)
def test_any_shape_of_a_dense_basis(degree, inputs, out, tokens, seed) -> None:
    torch.manual_seed(seed)
    layer = KANLinear(inputs, out, basis=Chebyshev(degree=degree), bias=False)
    x = 2 * torch.randn(tokens, inputs)
    got, exact = few(layer, x), copy.deepcopy(layer).double()
    # Terms may cancel, and an input's rounding counts for more the higher the degree.
    terms = exact.basis.values(x.double()).abs().sum(-1) @ exact.coefficients.abs().amax(dim=1)
    assert ((got - dense(exact, x.double())).abs() <= 1e-6 * degree * terms + 1e-6).all()


@native_only
def test_one_token_of_bfloat16_is_rounded_once() -> None:
    layer = KANLinear(64, 48, bias=True).bfloat16()
    x = torch.randn(1, 64).bfloat16()
    exact = dense(copy.deepcopy(layer).double(), x.double())
    assert ((few(layer, x) - exact).abs() <= 2**-8 * exact.abs() + 1e-5).all()


def coarse_coefficients(layer: KANLinear) -> None:
    layer.basis = BSpline(grid_size=12)


def short_base_weight(layer: KANLinear) -> None:
    layer.base_weight = torch.nn.Parameter(torch.randn(3, 8))


def no_base_weight(layer: KANLinear) -> None:
    layer.base_weight = None


def short_bias(layer: KANLinear) -> None:
    layer.bias = torch.nn.Parameter(torch.randn(3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (coarse_coefficients, "coefficients of 7 functions: the basis has 13"),
        (short_base_weight, r"weights of shape \(3, 8\): expected \(8, 8\)"),
        (no_base_weight, "base = 'silu': it has no weights"),
        (short_bias, r"weights of shape \(3,\): expected \(8,\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused(way, change, message) -> None:
    """They would be read past their ends."""
    layer = KANLinear(8, 8, basis=BSpline())
    change(layer)
    with pytest.raises(ValueError, match=message):
        few(layer, torch.randn(1, 8))
    with pytest.raises(ValueError, match=message):
        decoding(layer).__enter__()


@pytest.mark.parametrize("trained", ["base_weight", "bias"])
def test_a_layer_gives_a_gradient_to_all_that_wants_one(way, trained) -> None:
    layer = KANLinear(5, 7, basis=BSpline(), bias=True).requires_grad_(False)
    layer.get_parameter(trained).requires_grad_(True)
    with decoding(layer):
        assert layer(torch.randn(3, 5)).requires_grad


@pytest.mark.parametrize("grid_size", [6, 10, 11, 20])
def test_a_step_function_steps_at_its_knots(way, grid_size) -> None:
    """The cell right of a knot owns it; 0 is one of an even number of cells."""
    basis = BSpline(degree=0, grid_size=grid_size)
    layer = KANLinear(1, 1, basis=basis, base=None)
    x = basis.grid[0].unsqueeze(-1)
    torch.testing.assert_close(few(layer, x), dense(layer, x))


def test_inputs_that_wrap_others_are_not_read_as_memory(way) -> None:
    layer, x = KANLinear(8, 8, basis=BSpline()), torch.randn(3, 8)
    with torch.no_grad(), decoding(layer):
        torch.testing.assert_close(torch.vmap(layer)(x), layer(x), rtol=1e-5, atol=2e-6)
        both: Any = torch.func.jvp(layer, (x,), (torch.ones_like(x),))
        outputs, tangents = both
        torch.testing.assert_close(outputs, layer(x), rtol=1e-5, atol=2e-6)
        assert tangents.abs().min() > 0


def test_a_tangent_is_not_lost(way) -> None:
    forward_ad = torch.autograd.forward_ad
    layer, x = KANLinear(8, 8, basis=BSpline()).requires_grad_(False), torch.randn(3, 8)
    with torch.no_grad(), decoding(layer), forward_ad.dual_level():
        y = layer(forward_ad.make_dual(x, torch.ones_like(x)))
        assert forward_ad.unpack_dual(y).tangent is not None


@pytest.mark.filterwarnings("ignore")
def test_a_trace_computes_what_was_traced(way) -> None:
    layer, x = KANLinear(8, 8, basis=BSpline()), torch.randn(3, 8)
    with torch.no_grad(), decoding(layer):
        traced: Any = torch.jit.trace(layer, (torch.randn(3, 8),), check_trace=False)
        torch.testing.assert_close(traced(x), layer(x), rtol=1e-5, atol=2e-6)


class Boxes(Local):
    """Eight neighbouring functions that are 1, of nine."""

    num_functions, support = 9, 8
    flops_per_input = 1

    @property
    def label(self) -> str:
        return "boxes"

    def active(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (x > 0).long(), torch.ones(*x.shape, 8)

    def starting_values(self, x: torch.Tensor) -> torch.Tensor:
        return self.values(x.unsqueeze(-1)).squeeze(-2).to(x.dtype)

    def reset_parameters(self) -> None:
        pass


class Doubled(BSpline):
    """B-splines that are twice as high."""

    def active(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first, values = super().active(x)
        return first, 2 * values


@pytest.mark.parametrize("kind", [Boxes, Doubled])
def test_a_basis_of_somebody_else_s(way, kind) -> None:
    layer, x = KANLinear(5, 7, basis=kind()), torch.randn(3, 5)
    assert layer.base_weight is not None
    with torch.no_grad():
        functions_first = layer.basis.values(x).transpose(-1, -2).flatten(-2)
        expected = functions_first @ layer.coefficients.transpose(0, 1).flatten(0, 1)
        expected += torch.nn.functional.silu(x) @ layer.base_weight.T
        if layer.bias is not None:
            expected += layer.bias
    torch.testing.assert_close(few(layer, x), expected, rtol=1e-5, atol=1e-5)
