"""Sparse sums, compiled from C++ and through torch, against the dense formula."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kanlm.kan import BSpline, KANLinear, adapt_layer, native, refine_layer
from kanlm.kan.kernels import sparse, sparse_sums, use_backend
from kanlm.model.feed_forward.kan import KANLocal

native_only = pytest.mark.skipif(
    native.obstacle() is not None, reason=f"no native kernels: {native.obstacle()}"
)


@pytest.fixture(params=["native", "torch"])
def way(request, monkeypatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(sparse, "_native", lambda x: None)
    elif native.obstacle():
        pytest.skip(f"no native kernels: {native.obstacle()}")
    return request.param


def dense(layer: KANLinear, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), use_backend("reference"):
        return layer(x)


def few(layer: KANLinear, x: torch.Tensor, norm=None) -> torch.Tensor:
    with torch.no_grad():
        return sparse_sums(x, layer.as_sparse(norm))


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
@settings(deadline=None, max_examples=40)
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


@pytest.mark.parametrize("basis", [BSpline(), BSpline(6, per_channel=True)], ids=["one", "many"])
def test_a_norm_before(way, basis) -> None:
    layer = KANLinear(6, 5, basis=basis)
    gain, x = torch.rand(6) + 0.5, 3 * torch.randn(2, 4, 6)
    normed = torch.nn.functional.rms_norm(x, (6,), gain, 1e-3)
    got = few(layer, x, norm=(gain, 1e-3))
    torch.testing.assert_close(got, dense(layer, normed), rtol=1e-5, atol=2e-6)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_in_a_row_are_those_one_by_one(way, dtype) -> None:
    up, down = (
        KANLinear(9, 21, basis=BSpline()).to(dtype),
        KANLinear(21, 9, basis=BSpline(degree=2, grid_size=5), base=None, bias=True).to(dtype),
    )
    norm = torch.rand(21).to(dtype) + 0.5, 1e-6
    x = torch.randn(2, 3, 9).to(dtype)
    with torch.no_grad():
        got = sparse_sums(x, up.as_sparse(), down.as_sparse(norm))
    assert torch.equal(got, few(down, few(up, x), norm))


def test_what_is_kept_of_a_block_follows_its_weights(way) -> None:
    """Weights and grids that change in place, lie elsewhere, or are of another type."""
    block = KANLocal(5, 7, 1.0)
    assert isinstance(block.up.basis, BSpline)
    x = torch.randn(3, 5)

    def check(tolerance: float = 2e-6) -> None:
        with torch.no_grad():
            got = block(x)
            with use_backend("reference"):
                expected = block(x)
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)

    check()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    check()
    block.up.basis.knots.mul_(0.5)
    check()
    block.down.coefficients = torch.nn.Parameter(torch.randn_like(block.down.coefficients))
    block.norm.weight = torch.nn.Parameter(torch.randn_like(block.norm.weight))
    check()
    refine_layer(block.up, 12)
    check()
    block.load_state_dict({name: t.clone() for name, t in block.state_dict().items()}, assign=True)
    check()
    block.bfloat16()
    x = x.bfloat16()
    check(0.05)
    assert torch.equal(copy.deepcopy(block)(x), block(x))


def test_a_watched_layer_is_called() -> None:
    block = KANLocal(5, 7, 1.0)
    called: list[str] = []
    for name in ("up", "norm", "down"):
        handle = getattr(block, name).register_forward_hook(lambda *_, n=name: called.append(n))
        with torch.no_grad():
            block(torch.randn(1, 5))
        handle.remove()
    assert called == ["up", "norm", "down"]
