"""RBF, Fourier, wavelet, rational and implicit functions against their formulas in numpy."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from kanlm.kan import RBF, Basis, Fourier, Implicit, Rational, Wavelet

X = np.stack([np.linspace(-2, 2, 81), np.linspace(-1.9, 1.7, 81)], axis=-1)


def values(basis: Basis, x: np.ndarray = X) -> np.ndarray:
    """(n, in, B), in float64."""
    with torch.no_grad():
        return basis.double().values(torch.from_numpy(x)).numpy()


def jittered(basis: Basis) -> dict[str, np.ndarray]:
    """Move the parameters away from their start, and return them."""
    torch.manual_seed(0)
    basis.double()
    for p in basis.parameters():
        nn.init.normal_(p, std=0.4)
    return {name: p.detach().numpy() for name, p in basis.named_parameters()}


@pytest.mark.parametrize("shape", ["gaussian", "hat"])
def test_rbf(shape) -> None:
    basis = RBF(centers=5, shape=shape, width=1.3, half_width=2.0)
    u = (X[..., None] - np.linspace(-2, 2, 5)) / (1.3 * 1.0)
    expected = np.exp(-(u**2)) if shape == "gaussian" else np.maximum(1 - np.abs(u), 0)
    np.testing.assert_allclose(values(basis), expected, atol=1e-12)


def test_hats_are_linear_splines_outside_the_range_too() -> None:
    from kanlm.kan import BSpline

    hats = RBF(centers=5, shape="hat", half_width=2.0)
    splines = BSpline(degree=1, grid_size=4, grid_range=(-2.0, 2.0)).double()
    x = torch.linspace(-6, 6, 241, dtype=torch.float64).unsqueeze(-1)
    torch.testing.assert_close(hats.values(x), splines.values(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(hats.derivatives(x), splines.derivatives(x))


def test_fourier_repeats_itself() -> None:
    basis = Fourier(frequencies=3, half_width=1.5)
    for x in (X, 7 * X):
        angles = [k * math.pi / 1.5 * x for k in (1, 2, 3)]
        waves = [math.sqrt(2) * f(a) for a in angles for f in (np.sin, np.cos)]
        np.testing.assert_allclose(values(basis, x), np.stack(waves, -1), atol=1e-12)


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("mother", ["mexican-hat", "morlet"])
def test_wavelet(mother, per_channel: bool) -> None:
    basis = Wavelet(2, wavelets=3, mother=mother, half_width=2.0, per_channel=per_channel)
    own = jittered(basis)
    assert own["translations"].shape == (3, 2 if per_channel else 1)
    u = (X[..., None] - own["translations"].T) / np.exp(own["log_scales"].T)
    envelope = np.exp(-(u**2) / 2)
    expected = (
        np.cos(5 * u) * envelope
        if mother == "morlet"
        else 2 / (math.sqrt(3) * math.pi**0.25) * (1 - u**2) * envelope
    )
    np.testing.assert_allclose(values(basis), expected, atol=1e-12)


@pytest.mark.parametrize("per_channel", [True, False])
def test_rational(per_channel: bool) -> None:
    basis = Rational(2, numerator=4, denominator=3, half_width=2.0, per_channel=per_channel)
    rows = jittered(basis)["denominators"]
    assert rows.shape == (3, 2 if per_channel else 1)
    u = X / 2
    inside = sum(rows[j - 1] * u**j for j in (1, 2, 3))
    expected = np.stack([u**b / (1 + np.abs(inside)) for b in range(5)], axis=-1)
    np.testing.assert_allclose(values(basis), expected, atol=1e-12)


def test_rational_derivative_at_its_kink_is_from_the_right() -> None:
    basis = Rational(numerator=1, denominator=1, half_width=2.0).double()
    nn.init.constant_(basis.denominators, -3.0)
    # 1 / (1 + 1.5 |x|) and x / 2 times it.
    zero = torch.zeros(1, 1, dtype=torch.float64)
    np.testing.assert_allclose(basis.derivatives(zero).detach()[0, 0], [-1.5, 0.5], atol=1e-12)


def test_implicit() -> None:
    basis = Implicit(outputs=3, hidden=5, half_width=2.0)
    own = jittered(basis)
    u = own["slants"][:, 0] * (X[..., None] - own["places"][:, 0])
    units = u / (1 + np.exp(-u))
    expected = units @ own["mixture"].reshape(3, 5).T
    np.testing.assert_allclose(values(basis), expected, atol=1e-12)


def test_implicit_starts_with_functions_that_differ() -> None:
    start = values(Implicit(outputs=6, hidden=8), X[:, :1])[:, 0]
    assert np.linalg.cond(start) < 1e4


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (RBF, {"centers": 1}, "centers = 1"),
        (RBF, {"shape": "box"}, "box"),
        (RBF, {"width": 0.0}, "width = 0"),
        (Fourier, {"frequencies": 0}, "frequencies = 0"),
        (Wavelet, {"mother": "haar"}, "haar"),
        (Wavelet, {"wavelets": 0}, "wavelets = 0"),
        (Rational, {"numerator": -1}, "numerator = -1"),
        (Rational, {"denominator": 0}, "denominator = 0"),
        (Implicit, {"outputs": 0}, "outputs = 0"),
        (Implicit, {"hidden": 3, "outputs": 3}, "hidden = 3"),
    ],
)
def test_impossible_options_are_refused(kind, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**options)
