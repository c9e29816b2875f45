"""Orthogonal polynomials against numpy's and scipy's."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.polynomial import chebyshev, hermite_e, legendre
from scipy import special

from kanlm.kan import Chebyshev, Hermite, Legendre

DEGREE = 9


def series(function: Callable, n: int, m: int, u: np.ndarray, derive: Callable) -> np.ndarray:
    """The m-th derivative of polynomial n, from numpy's module of its kind."""
    unit = np.eye(n + 1)[n]
    return function(u, derive(unit, m) if m else unit)


def expected(kind: type, x: np.ndarray, half_width: float, m: int) -> np.ndarray:
    """(n, degree + 1) of values, or first derivatives by x, from numpy."""
    columns = []
    for n in range(DEGREE + 1):
        if kind is Chebyshev:
            column = series(chebyshev.chebval, n, m, x / half_width, chebyshev.chebder)
        elif kind is Legendre:
            column = series(legendre.legval, n, m, x / half_width, legendre.legder)
            column = column * math.sqrt(2 * n + 1)
        else:
            column = series(hermite_e.hermeval, n, m, x, hermite_e.hermeder)
            column = column / math.sqrt(math.factorial(n))
        columns.append(column / (1 if kind is Hermite else half_width**m))
    return np.stack(columns, axis=-1)


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("kind", [Chebyshev, Legendre, Hermite])
def test_values_and_derivatives_are_numpys(kind, constant: bool) -> None:
    """Inside the range and at its ends, where `acos` would have no derivative."""
    half_width = 1.7
    basis = kind(degree=DEGREE, constant=constant, half_width=half_width, outside="linear")
    x = torch.linspace(-half_width, half_width, 101, dtype=torch.float64)
    first = 0 if constant else 1
    for got, m in ((basis.values, 0), (basis.derivatives, 1)):
        ours = got(x.unsqueeze(-1))[:, 0].numpy()
        assert ours.shape == (101, DEGREE + constant)
        theirs = expected(kind, x.numpy(), half_width, m)[:, first:]
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("kind", [Chebyshev, Legendre, Hermite])
def test_squashed_inputs_are_bent_by_tanh(kind) -> None:
    basis = kind(degree=4, half_width=1.7, outside="squash")
    x = np.linspace(-9, 9, 61)
    bent = 1.7 * np.tanh(x / 1.7)
    evaluate = {
        Chebyshev: lambda n: special.eval_chebyt(n, bent / 1.7),
        Legendre: lambda n: special.eval_legendre(n, bent / 1.7) * math.sqrt(2 * n + 1),
        Hermite: lambda n: special.eval_hermitenorm(n, bent) / math.sqrt(math.factorial(n)),
    }[kind]
    theirs = np.stack([evaluate(n) for n in range(1, 5)], axis=-1)
    ours = basis.values(torch.from_numpy(x).unsqueeze(-1))[:, 0]
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-10, atol=1e-10)


def test_they_are_orthonormal_under_their_weights() -> None:
    """By Gauss quadrature: Legendre on the range, Hermite under a unit normal."""
    u, w = np.polynomial.legendre.leggauss(20)
    basis = Legendre(degree=6, constant=True, half_width=2.0, outside="linear")
    values = basis.values(torch.from_numpy(2 * u).unsqueeze(-1))[:, 0].numpy()
    np.testing.assert_allclose((values.T * w / 2) @ values, np.eye(7), atol=1e-12)

    z, w = np.polynomial.hermite_e.hermegauss(20)
    hermite = Hermite(degree=6, constant=True, half_width=10.0, outside="linear")
    values = hermite.values(torch.from_numpy(z).unsqueeze(-1))[:, 0].numpy()
    gram = (values.T * w / math.sqrt(2 * math.pi)) @ values
    np.testing.assert_allclose(gram, np.eye(7), atol=1e-10)


@pytest.mark.parametrize("kind", [Chebyshev, Legendre, Hermite])
def test_impossible_options_are_refused(kind) -> None:
    for options, message in (
        ({"degree": 0}, "degree = 0"),
        ({"half_width": 0.0}, "half_width = 0"),
        ({"outside": "periodic"}, "periodic"),
        ({"outside": "clamp"}, "clamp"),
    ):
        with pytest.raises(ValueError, match=message):
            kind(**options)
