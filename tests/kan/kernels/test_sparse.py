"""Sparse sums, compiled from C++ and through torch, against the dense formula."""

import copy
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from hypothesis import given, settings
from hypothesis import strategies as st

from kanlm.kan import (
    BSpline,
    Hermite,
    KANLinear,
    adapt_layer,
    native,
    refine_layer,
    refit_layer,
)
from kanlm.kan.bases import Local
from kanlm.kan.kernels import sparse, sparse_sums, use_backend
from kanlm.model.feed_forward.kan import KANLocal
from kanlm.model.layers import RMSNorm

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

    def check(tolerance: float = 1e-5) -> None:
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_takes_the_norm_before_it_along(way, dtype) -> None:
    """And notices that another stands in its place."""
    block = KANLocal(8, 12, 1.0).to(dtype)
    x = 3 * torch.randn(3, 8).to(dtype)
    with torch.no_grad():
        for norm in (RMSNorm(8).to(dtype), RMSNorm(8, epsilon=0.5).to(dtype)):
            torch.nn.init.normal_(norm.weight)
            got = block.after_norm(x, norm)
            exact = copy.deepcopy(block).double()(copy.deepcopy(norm).double()(x.double()))
            tolerance = 2**-6 if dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=tolerance)


def test_a_watched_norm_or_block_is_called() -> None:
    block, norm, called = KANLocal(5, 7, 1.0), RMSNorm(5), []
    for module in (norm, block):
        handle = module.register_forward_hook(lambda module, *_: called.append(module))
        with torch.no_grad():
            block.after_norm(torch.randn(1, 5), norm)
        handle.remove()
    assert called == [norm, block]


def test_a_watched_layer_is_called() -> None:
    block = KANLocal(5, 7, 1.0)
    called: list[str] = []
    for name in ("up", "norm", "down"):
        handle = getattr(block, name).register_forward_hook(lambda *_, n=name: called.append(n))
        with torch.no_grad():
            block(torch.randn(1, 5))
        handle.remove()
    assert called == ["up", "norm", "down"]


@pytest.mark.parametrize("channels", [0, 4, 12])
def test_a_block_refuses_inputs_of_another_width(way, channels) -> None:
    """As each of its layers does: more of them would be written past the outputs' end."""
    block = KANLocal(8, 8, 1.0)
    with torch.no_grad(), pytest.raises(ValueError, match=f"{channels} channels: expected 8"):
        block(torch.ones(1, channels))


def coarse_coefficients(block: KANLocal) -> None:
    block.up.basis = BSpline(grid_size=12)


def short_base_weight(block: KANLocal) -> None:
    block.up.base_weight = torch.nn.Parameter(torch.randn(3, 8))


def no_base_weight(block: KANLocal) -> None:
    block.up.base_weight = None


def short_bias(block: KANLocal) -> None:
    block.down.bias = torch.nn.Parameter(torch.randn(3))


def short_gain(block: KANLocal) -> None:
    block.norm.weight = torch.nn.Parameter(torch.randn(3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (coarse_coefficients, "coefficients of 7 functions: the basis has 13"),
        (short_base_weight, r"weights of shape \(3, 8\): expected \(8, 8\)"),
        (no_base_weight, "base = 'silu': it has no weights"),
        (short_bias, r"weights of shape \(3,\): expected \(8,\)"),
        (short_gain, r"weights of shape \(3,\): expected \(8,\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused(way, change, message) -> None:
    """Every time: they would be read past their ends."""
    block, x = KANLocal(8, 8, 1.0), torch.randn(1, 8)
    with torch.no_grad():
        block(x)
        change(block)
        for _ in range(2):
            with pytest.raises(ValueError, match=message):
                block(x)


@pytest.mark.parametrize(
    "trained", ["up.base_weight", "norm.weight", "down.coefficients", "down.base_weight"]
)
def test_a_block_gives_a_gradient_to_all_that_wants_one(way, trained) -> None:
    """Also where the first layer's coefficients are frozen."""
    block, x = KANLocal(5, 7, 1.0).requires_grad_(False), torch.randn(3, 5)
    parameter = block.get_parameter(trained).requires_grad_(True)

    def gradient() -> torch.Tensor:
        y = block(x)
        assert y.requires_grad
        return torch.autograd.grad(y.square().sum(), parameter)[0]

    got = gradient()
    with use_backend("reference"):
        torch.testing.assert_close(got, gradient(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("trained", ["base_weight", "bias"])
def test_a_layer_gives_a_gradient_to_all_that_wants_one(way, trained) -> None:
    layer = KANLinear(5, 7, basis=BSpline(), bias=True).requires_grad_(False)
    layer.get_parameter(trained).requires_grad_(True)
    assert layer(torch.randn(3, 5)).requires_grad


def change_epsilon(block: KANLocal) -> None:
    block.norm.epsilon = 0.5


def change_base(block: KANLocal) -> None:
    block.up.base = "identity"


def add_bias(block: KANLocal) -> None:
    block.up.bias = torch.nn.Parameter(torch.randn(8))


def transpose_weights(block: KANLocal) -> None:
    assert block.up.base_weight is not None
    block.up.base_weight.data = block.up.base_weight.data.t()


def free_knots(block: KANLocal) -> None:
    """Another basis over the same buffer."""
    basis = BSpline(equal_cells=False)
    basis.knots = block.up.basis.get_buffer("knots")
    basis.knots[0, 3] += 0.4
    block.up.basis = basis


def free_knots_in_place(block: KANLocal) -> None:
    assert isinstance(block.up.basis, BSpline)
    block.up.basis.equal_cells = False
    block.up.basis.knots[0, 3] += 0.4


@pytest.mark.parametrize(
    "change",
    [change_epsilon, change_base, add_bias, transpose_weights, free_knots, free_knots_in_place],
)
def test_what_is_kept_of_a_block_follows_what_moves_no_memory(way, change) -> None:
    block, x = KANLocal(8, 8, 1.0), torch.randn(3, 8)
    with torch.no_grad():
        block(x)
        change(block)
        got = block(x)
        with use_backend("reference"):
            torch.testing.assert_close(got, block(x), rtol=1e-5, atol=1e-5)


class Twice(torch.nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def compute_coefficients(block: KANLocal) -> None:
    """Anew at every look."""
    torch.nn.utils.parametrize.register_parametrization(block.up, "coefficients", Twice())


def hold_coefficients_in_an_attribute(block: KANLocal) -> None:
    """As FSDP does with views of its flat parameter."""
    coefficients: Any = block.up.coefficients.detach()
    del block.up.coefficients
    block.up.coefficients = coefficients


@pytest.mark.parametrize("change", [compute_coefficients, hold_coefficients_in_an_attribute])
def test_nothing_is_kept_of_weights_that_are_no_parameters(way, change) -> None:
    block, x = KANLocal(8, 8, 1.0), torch.randn(3, 8)
    change(block)
    with torch.no_grad():
        for _ in range(3):
            got = block(x)
            with use_backend("reference"):
                torch.testing.assert_close(got, block(x), rtol=1e-5, atol=1e-5)
            if change is hold_coefficients_in_an_attribute:
                coefficients: Any = torch.randn_like(block.up.coefficients)
                block.up.coefficients = coefficients


class Adapted(KANLinear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x.sum(-1, keepdim=True)


class Halved(KANLocal):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / 2


def adapt_up(block: KANLocal, norm: torch.nn.Module) -> torch.nn.Module:
    block.up = Adapted(8, 8, basis=BSpline())
    return norm


def wrap_down(block: KANLocal, norm: torch.nn.Module) -> torch.nn.Module:
    block.add_module("down", torch.nn.Sequential(block.down, torch.nn.Tanh()))
    return norm


def replace_inner_norm(block: KANLocal, norm: torch.nn.Module) -> torch.nn.Module:
    block.add_module("norm", torch.nn.LayerNorm(8))
    return norm


def replace_norm(block: KANLocal, norm: torch.nn.Module) -> torch.nn.Module:
    return torch.nn.LayerNorm(8)


def derive_block(block: KANLocal, norm: torch.nn.Module) -> torch.nn.Module:
    block.__class__ = Halved
    return norm


@pytest.mark.parametrize(
    "change", [adapt_up, wrap_down, replace_inner_norm, replace_norm, derive_block]
)
def test_modules_of_somebody_else_s_are_called(way, change) -> None:
    """Adapters around layers, other norms, and blocks that compute something else."""
    block, x = KANLocal(8, 8, 1.0), torch.randn(3, 8)
    norm: Any = change(block, RMSNorm(8))
    with torch.no_grad():
        got = block.after_norm(x, norm)
        with use_backend("reference"):
            torch.testing.assert_close(got, block(norm(x)), rtol=1e-5, atol=1e-5)


def test_a_block_whose_second_layer_was_refitted_to_another_kind(way) -> None:
    block, x = KANLocal(8, 8, 1.0), torch.randn(3, 8)
    refit_layer(block.down, Hermite(), torch.randn(100, 8))
    with torch.no_grad():
        got = block(x)
        with use_backend("reference"):
            torch.testing.assert_close(got, block(x), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("grid_size", [6, 10, 11, 20])
def test_a_step_function_steps_at_its_knots(way, grid_size) -> None:
    """The cell right of a knot owns it; 0 is one of an even number of cells."""
    basis = BSpline(degree=0, grid_size=grid_size)
    layer = KANLinear(1, 1, basis=basis, base=None)
    x = basis.grid[0].unsqueeze(-1)
    torch.testing.assert_close(few(layer, x), dense(layer, x))


def test_inputs_that_wrap_others_are_not_read_as_memory(way) -> None:
    block, x = KANLocal(8, 8, 1.0), torch.randn(3, 8)
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(block)(x), block(x), rtol=1e-5, atol=2e-6)


def test_a_tangent_is_not_lost(way) -> None:
    forward_ad = torch.autograd.forward_ad
    block, x = KANLocal(8, 8, 1.0).requires_grad_(False), torch.randn(3, 8)
    with forward_ad.dual_level():
        y = block(forward_ad.make_dual(x, torch.ones_like(x)))
        assert forward_ad.unpack_dual(y).tangent is not None


@pytest.mark.filterwarnings("ignore")
def test_a_trace_computes_what_was_traced(way) -> None:
    block, x = KANLocal(8, 8, 1.0), torch.randn(3, 8)
    with torch.no_grad():
        traced: Any = torch.jit.trace(block, (torch.randn(3, 8),), check_trace=False)
        torch.testing.assert_close(traced(x), block(x), rtol=1e-5, atol=2e-6)


def test_a_hook_on_all_modules_sees_the_inner_layers() -> None:
    """As those of torch's module trackers."""
    block, called = KANLocal(5, 7, 1.0), []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: called.append(module)
    )
    try:
        with torch.no_grad():
            block(torch.randn(1, 5))
    finally:
        handle.remove()
    assert called == [block.up, block.norm, block.down, block]


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


def test_an_offloaded_block_is_fetched_layer_by_layer(way) -> None:
    """Accelerate wraps each layer's `forward`, which brings its weights from elsewhere."""
    block, x = KANLocal(5, 7, 1.0), torch.randn(3, 5)
    with torch.no_grad():
        expected = block(x)
        cpu_offload(block, execution_device=torch.device("cpu"))
        torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=2e-6)


def test_an_ensemble_of_blocks_is_computed_at_once(way) -> None:
    """By torch.func's transforms over their weights, while inputs are plain."""
    blocks, x = [KANLocal(8, 8, 1.0) for _ in range(3)], torch.randn(2, 8)
    with torch.no_grad():
        expected = torch.stack([block(x) for block in blocks])
        weights, buffers = torch.func.stack_module_state(blocks)  # pyright: ignore[reportArgumentType]
        got = torch.vmap(lambda w, b: torch.func.functional_call(blocks[0], (w, b), (x,)))(
            weights, buffers
        )
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-6)
