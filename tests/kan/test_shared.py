"""Shared functions against their definition, written out channel by channel."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.special import erf
from torch.autograd import gradcheck

from kanlm.kan import (
    BSpline,
    Chebyshev,
    Hermite,
    KANLinear,
    Rational,
    SharedFunctionLinear,
    SharedFunctions,
    Wavelet,
)

ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * (1 + erf(x / math.sqrt(2))) / 2,
    "identity": lambda x: x,
}


def drawn(layer: torch.nn.Module) -> torch.nn.Module:
    """The layer in float64, with all parameters drawn and so different everywhere."""
    for parameter in layer.double().parameters():
        torch.nn.init.normal_(parameter)
    return layer


@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize(
    ("groups", "basis"),
    [
        (None, BSpline(degree=2, grid_size=3)),
        (None, Rational(6)),
        (None, BSpline(6, equal_cells=False, per_channel=True)),
        (1, Chebyshev()),
        (2, BSpline(degree=1, grid_size=3)),
        (2, Rational(2)),
        (3, BSpline(3, equal_cells=False, per_channel=True)),
    ],
)
def test_mixes_the_functions_of_a_channels_group(groups, basis, rank: int, shape) -> None:
    torch.manual_seed(0)
    layer = SharedFunctionLinear(6, 2, basis=basis, rank=rank, groups=groups, bias=True)
    drawn(layer)
    assert layer.bias is not None
    if isinstance(basis, BSpline):
        basis.reset_parameters()
        if len(basis.knots) > 1:
            basis.knots.add_(0.1 * torch.rand_like(basis.knots))
    functions, members = layer.functions, 6 // layer.functions.groups
    x = 2 * torch.randn(*shape, 6, dtype=torch.float64)
    # The basis of channel i, whichever parameters it has there.
    owners = torch.arange(6) // members
    channels = basis.channels or 1
    values = [
        basis.values(x[..., i, None].expand(*shape, channels))[..., owners[i] % channels, :]
        for i in range(6)
    ]
    expected = layer.bias.expand(*shape, 2).clone()
    for i, r, o in itertools.product(range(6), range(rank), range(2)):
        f = (values[i] * functions.coefficients[owners[i], :, r]).sum(-1)
        expected[..., o] += layer.weight[o, r * 6 + i] * f
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_full_rank_is_the_kan_of_the_same_coefficients() -> None:
    torch.manual_seed(0)
    kan = KANLinear(5, 3, basis=BSpline(degree=2, grid_size=3), base=None).double()
    shared = SharedFunctionLinear(5, 3, basis=BSpline(degree=2, grid_size=3), rank=5).double()
    with torch.no_grad():
        shared.functions.coefficients.copy_(torch.eye(5))
        shared.weight.copy_(kan.coefficients.permute(2, 1, 0).flatten(1))
    x = 2 * torch.randn(7, 5, dtype=torch.float64)
    torch.testing.assert_close(shared(x), kan(x))


@pytest.mark.parametrize("start", ["silu", "gelu", "identity"])
@pytest.mark.parametrize(
    ("basis", "errors"),
    [
        # The largest error within three standard deviations of a unit normal.
        (BSpline(degree=3, grid_size=8), {"silu": 0.002, "gelu": 0.002, "identity": 1e-6}),
        (BSpline(), {"silu": 0.05, "gelu": 0.07, "identity": 1e-6}),
        (
            Rational(2, numerator=5, denominator=4, half_width=2.5),
            {"silu": 0.011, "gelu": 0.015, "identity": 1e-6},
        ),
    ],
    ids=["cubic", "linear", "rational"],
)
def test_starts_as_an_activation(basis, errors: dict[str, float], start) -> None:
    functions = SharedFunctions(2, basis=basis, rank=2, groups=2, start=start).double()
    functions.reset_parameters()
    x = np.linspace(-3, 3, 601)
    y = functions(torch.from_numpy(x).unsqueeze(-1).expand(-1, 2)).detach().numpy()
    assert y.shape == (601, 4)
    assert np.abs(y - ACTIVATIONS[start](x)[:, None]).max() < errors[start]


def test_drawn_functions_differ_and_have_unit_mean_square() -> None:
    torch.manual_seed(0)
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    for basis in (BSpline(degree=3), Hermite(degree=3)):
        functions = SharedFunctions(4, basis=basis, rank=3, start="random").double()
        functions.reset_parameters()
        y = functions(torch.from_numpy(nodes).unsqueeze(-1).expand(-1, 4)).detach().numpy()
        squares = (weights[:, None] * y**2).sum(0) / weights.sum()
        np.testing.assert_allclose(squares, 1, rtol=0.01)
        inner = np.einsum("n,na,nb->ab", weights, y, y) / weights.sum()
        assert np.abs(inner - np.diag(np.diag(inner))).max() < 0.999


@pytest.mark.parametrize("width", [16, 64, 256, 1024])
@pytest.mark.parametrize("groups", [None, 8])
@pytest.mark.parametrize(("start", "rank"), [("silu", 1), ("random", 1), ("random", 3)])
def test_keeps_the_variance_of_normal_inputs(width: int, groups, start, rank: int) -> None:
    torch.manual_seed(0)
    gain, squares = 0.5, []
    layer = SharedFunctionLinear(width, 16, rank=rank, groups=groups, start=start, gain=gain)
    for _ in range(max(5, 4096 // width)):
        for module in layer.modules():
            if isinstance(module, SharedFunctions | SharedFunctionLinear):
                module.reset_parameters()
        with torch.no_grad():
            squares.append(layer(torch.randn(128, width)).square().mean())
    assert torch.stack(squares).mean().item() == pytest.approx(gain**2, rel=0.1)


@pytest.mark.parametrize("basis", [BSpline(degree=3), Rational(2)])
def test_gradcheck(basis) -> None:
    torch.manual_seed(0)
    layer = drawn(SharedFunctionLinear(4, 2, basis=basis, rank=2, groups=2))
    if isinstance(basis, BSpline):
        basis.reset_parameters()
    names = [name for name, _ in layer.named_parameters()]
    x = torch.tensor([[-3.6, 0.4, 1.3, 0.2], [2.6, -1.2, 3.2, -0.7]], dtype=torch.float64)

    def call(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    parameters = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    assert gradcheck(call, (x.requires_grad_(), *parameters))


def test_parameters_have_the_saved_names_and_shapes() -> None:
    layer = SharedFunctionLinear(6, 4, basis=Chebyshev(degree=4), rank=2, groups=3)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert shapes == {"functions.coefficients": (3, 4, 2), "weight": (4, 12), "bias": (4,)}
    # B-splines span constants.
    assert SharedFunctionLinear(6, 4).bias is None
    assert SharedFunctionLinear(6, 4, bias=True).bias is not None


def test_labels_state_basis_rank_and_groups() -> None:
    assert SharedFunctionLinear(8, 4, rank=2).label == "bspline1-g6-rank2"
    assert SharedFunctionLinear(8, 4, groups=2).label == "bspline1-g6-rank1-groups2"


def test_precision_follows_the_input() -> None:
    torch.manual_seed(0)
    layer, x = SharedFunctionLinear(64, 32, rank=2, start="random"), torch.randn(200, 64)
    exact = layer.double()(x.double())
    assert exact.dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        rough = layer.float()(x)
    assert rough.dtype == torch.bfloat16
    assert (rough - exact).square().mean().sqrt() < 0.02
    rough = layer.bfloat16()(x.bfloat16())
    assert rough.dtype == torch.bfloat16
    assert (rough - exact).square().mean().sqrt() < 0.03


def test_flops_count_matrix_and_functions() -> None:
    layer = SharedFunctionLinear(12, 5, basis=Chebyshev(degree=4), rank=3, groups=4)
    evaluated = 12 * (layer.functions.basis.flops_per_input + 2 * 4 * 3)
    assert layer.flops_per_token == 2 * 5 * 36 + evaluated + 5


def test_builds_without_memory() -> None:
    with torch.device("meta"):
        for start in ("silu", "random"):
            layer = SharedFunctionLinear(8, 4, basis=Rational(2), groups=2, start=start)
            assert layer(torch.empty(3, 8)).shape == (3, 4)


def test_no_graph_breaks() -> None:
    layer = SharedFunctionLinear(8, 3, basis=Rational(2), rank=2, groups=2)
    explanation = torch._dynamo.explain(layer)(torch.randn(2, 8))
    assert explanation.graph_break_count == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 4}, "groups = 4 does not divide the 6 channels"),
        ({"groups": 0}, "groups = 0 does not divide"),
        ({"rank": 0}, "rank = 0: expected 1 to 7"),
        ({"rank": 8}, "rank = 8: expected 1 to 7, the number of basis functions"),
        ({"start": "relu"}, "start = 'relu': expected silu, gelu, identity, random"),
        ({"basis": Rational(6), "groups": 2}, "parameters for 6 channels, and there are 2 groups"),
    ],
)
def test_impossible_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SharedFunctionLinear(6, 2, **options)


def test_starts_that_the_basis_cannot_make_are_refused() -> None:
    """One even function is like no line, and a map of functions that are 0 has no scale."""
    for basis in (Wavelet(wavelets=1), BSpline(degree=0, grid_size=1)):
        with pytest.raises(ValueError, match="start = 'identity'"):
            SharedFunctionLinear(4, 2, basis=basis, start="identity")
        assert SharedFunctionLinear(4, 2, basis=basis, start="random").weight.abs().max() < 10


def test_one_channel_does_not_stand_for_many() -> None:
    with pytest.raises(ValueError, match="x has 1 channels: expected 3"):
        SharedFunctionLinear(3, 2)(torch.randn(5, 1))
