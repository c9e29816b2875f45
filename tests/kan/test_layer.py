"""KANLinear against its definition, written out edge by edge."""

import itertools

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F

from kanlm.kan import BSpline, Chebyshev, KANLinear

BASES = ("silu", "identity", None)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("degree", [1, 2, 3])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_sums_a_function_on_every_edge(base, degree: int, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    basis = BSpline(degree=degree, grid_size=4)
    layer = KANLinear(3, 2, basis=basis, base=base, bias=True).double()
    assert layer.bias is not None
    torch.nn.init.normal_(layer.bias)
    x = 2 * torch.randn(*shape, 3, dtype=torch.float64)
    expected = layer.bias.expand(*shape, 2).clone()
    for i, o in itertools.product(range(3), range(2)):
        z = x[..., i]
        edge = (basis.values(z.unsqueeze(-1)).squeeze(-2) * layer.coefficients[i, :, o]).sum(-1)
        if layer.base_weight is not None:
            edge = edge + layer.base_weight[o, i] * (F.silu(z) if base == "silu" else z)
        expected[..., o] += edge
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("degree", [1, 3])
def test_gradcheck(degree: int) -> None:
    layer = KANLinear(3, 2, basis=BSpline(degree=degree)).double()
    x = torch.tensor([[-3.6, 0.4, 1.3], [2.6, -1.2, 3.2]], dtype=torch.float64)
    assert gradcheck(layer, x.requires_grad_())


@pytest.mark.parametrize("width", [16, 64, 256, 1024])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("degree", [1, 2, 3])
def test_keeps_the_variance_of_normal_inputs(width: int, base, degree: int) -> None:
    """Over as many draws of the weights as leave less than a percent of noise."""
    torch.manual_seed(0)
    gain, squares = 0.5, []
    layer = KANLinear(width, 16, basis=BSpline(degree=degree), base=base, gain=gain)
    for _ in range(max(5, 4096 // width)):
        layer.reset_parameters()
        with torch.no_grad():
            squares.append(layer(torch.randn(128, width)).square().mean())
    assert torch.stack(squares).mean().item() == pytest.approx(gain**2, rel=0.1)


@pytest.mark.parametrize("start", ["random", "linear", "zero"])
@pytest.mark.parametrize("base", ["silu", "identity"])
def test_every_start_keeps_the_variance(start, base) -> None:
    torch.manual_seed(0)
    squares = []
    layer = KANLinear(64, 64, basis=BSpline(), base=base, gain=0.5, start=start)
    for _ in range(32):
        layer.reset_parameters()
        with torch.no_grad():
            squares.append(layer(torch.randn(128, 64)).square().mean())
    assert torch.stack(squares).mean().item() == pytest.approx(0.25, rel=0.1)
    assert layer.base_weight is not None
    assert (layer.coefficients == 0).all() == (start == "zero")
    assert (layer.base_weight == 0).all() == (start == "linear")


def test_parameters_have_the_saved_names_and_shapes() -> None:
    layer = KANLinear(5, 4, basis=BSpline(grid_size=3, degree=2), bias=True)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert shapes == {"coefficients": (5, 5, 4), "base_weight": (4, 5), "bias": (4,)}
    assert KANLinear(5, 4, base=None, bias=False).base_weight is None


def test_a_bias_is_within_the_span() -> None:
    """Adding c/in to every coefficient adds c to the output: B-splines need no bias."""
    torch.manual_seed(0)
    layer = KANLinear(8, 3, basis=BSpline(), bias=False).double()
    x = 3 * torch.randn(10, 8, dtype=torch.float64)
    before = layer(x)
    with torch.no_grad():
        layer.coefficients.add_(0.7 / 8)
    torch.testing.assert_close(layer(x), before + 0.7)


def test_float64_stays_float64_and_bfloat16_stays_near() -> None:
    torch.manual_seed(0)
    layer, x = KANLinear(64, 32, basis=BSpline()), torch.randn(200, 64)
    exact = layer.double()(x.double())
    assert exact.dtype == torch.float64
    rough = layer.bfloat16()(x.bfloat16())
    assert rough.dtype == torch.bfloat16
    assert (rough - exact).square().mean().sqrt() < 0.02


def test_autocast_computes_in_bfloat16() -> None:
    torch.manual_seed(0)
    layer, x = KANLinear(64, 32, basis=BSpline()), torch.randn(200, 64)
    with torch.autocast("cpu", torch.bfloat16):
        rough = layer(x)
    assert rough.dtype == torch.bfloat16
    assert (rough - layer(x)).square().mean().sqrt() < 0.02


def test_flops_count_the_matrix_products_and_more() -> None:
    layer = KANLinear(12, 5, basis=BSpline(degree=1, grid_size=6), bias=False)
    products = 2 * 12 * (7 + 1) * 5
    # What is evaluated on an input: hundreds of operations at most, none of them on edges.
    assert products < layer.flops_per_token < products + 12 * 100


def test_no_graph_breaks() -> None:
    layer = KANLinear(4, 3, basis=BSpline())
    explanation = torch._dynamo.explain(layer)(torch.randn(2, 4))
    assert explanation.graph_break_count == 0


def test_the_default_is_cubic_hermite_and_local_functions_get_a_base() -> None:
    layer = KANLinear(4, 3)
    assert layer.label == "hermite3-squash"
    assert layer.bias is not None
    assert KANLinear(4, 3, basis=BSpline()).label == "bspline1-g6-silu"
    assert KANLinear(4, 3, basis=BSpline(), base=None).label == "bspline1-g6"
    assert KANLinear(4, 3, basis=Chebyshev()).base_weight is None


@pytest.mark.parametrize("basis", ["bspline", BSpline])
def test_what_is_no_basis_is_refused(basis) -> None:
    with pytest.raises(ValueError, match="in_features = 0, out_features = 4: expected at least 1"):
        KANLinear(0, 4)
    with pytest.raises(ValueError, match="x has 3 channels: expected 2"):
        KANLinear(2, 4)(torch.randn(5, 3))
    with pytest.raises(ValueError, match=r"basis = .*: expected a Basis, such as Hermite"):
        KANLinear(4, 3, basis=basis)
