"""Waves, wavelets, rational functions and networks in C++ against torch's in float64."""

import copy

import pytest
import torch

from kanlm.kan import Fourier, Implicit, Rational, Wavelet, cpp_build
from kanlm.kan.bases import Smooth

pytestmark = pytest.mark.skipif(
    cpp_build.obstacle() is not None, reason=f"no native kernels: {cpp_build.obstacle()}"
)

CHANNELS = 37
BASES = {
    "fourier": Fourier(),
    "fourier32": Fourier(frequencies=32),
    "hat": Wavelet(CHANNELS),
    "morlet": Wavelet(CHANNELS, wavelets=7, mother="morlet"),
    "one hat": Wavelet(CHANNELS, per_channel=False),
    "rational": Rational(CHANNELS),
    "rational5-4": Rational(CHANNELS, numerator=5, denominator=4),
    "one rational": Rational(CHANNELS, per_channel=False),
    "constant": Rational(CHANNELS, numerator=0, denominator=1),
    "implicit": Implicit(),
    "implicit64": Implicit(outputs=3, hidden=64),
}


@pytest.fixture(params=BASES)
def basis(request) -> Smooth:
    """Moved away from its start."""
    torch.manual_seed(0)
    basis = copy.deepcopy(BASES[request.param])
    for parameter in basis.parameters():
        with torch.no_grad():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return basis


@pytest.mark.parametrize("tokens", [0, 1, 3, 50])
def test_values_and_slopes(basis: Smooth, tokens: int) -> None:
    """In the range, at its ends, in the tails, and far away."""
    x = 2 * torch.randn(tokens, CHANNELS)
    x.view(-1)[:6] = torch.tensor([-3.0, 3.0, 0.0, 9.0, -40.0, 4.0])[: x.numel()]
    formulas = basis.cpp_formulas()
    assert formulas is not None
    assert formulas.can(x)
    exact = copy.deepcopy(basis).double()
    with torch.no_grad():
        values = exact.values(x.double()).mT
        slopes = exact.derivatives(x.double()).mT
    functions = basis.num_functions
    # A distance of float32 counts for more the steeper a function is.
    steepest = slopes.abs().amax(dim=1, keepdim=True)
    scale = 1 + values.abs() + steepest * x.abs().unsqueeze(1)
    to = torch.full((tokens, functions + 1, CHANNELS), 7.0)
    basis.write_values(x, to[:, :-1])
    assert (to[:, -1] == 7).all()
    assert ((to[:, :-1] - values).abs() <= 2e-6 * scale).all()
    gradients = torch.randn(tokens, functions, CHANNELS)
    got = basis.pull_back(x, gradients)
    steps = (gradients.abs() * (1 + steepest + scale)).sum(1)
    assert ((got - (gradients * slopes).sum(1)).abs() <= 2e-5 * steps).all()


def test_not_a_number_stays_one(basis: Smooth) -> None:
    x = torch.full((1, CHANNELS), 0.5)
    x[0, 3] = torch.nan
    to = torch.empty(1, basis.num_functions, CHANNELS)
    basis.write_values(x, to)
    assert to[..., 3].isnan().all()
    assert not to[..., :3].isnan().any()


def test_bent_inputs_and_large_networks_take_torch() -> None:
    for basis in (
        Wavelet(3, outside="squash"),
        Rational(3, outside="squash"),
        Implicit(outside="squash"),
        Implicit(hidden=65),
    ):
        assert basis.cpp_formulas() is None
