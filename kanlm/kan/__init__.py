"""Kolmogorov-Arnold layers for any torch model. Imports torch alone."""

from .bases import (
    BASES,
    RBF,
    Basis,
    BSpline,
    Chebyshev,
    Fourier,
    Hermite,
    Implicit,
    Legendre,
    Rational,
    Wavelet,
)
from .decode import decoding
from .grid import (
    Refit,
    adapt_layer,
    grid_from_quantiles,
    input_quantiles,
    refine_layer,
    refine_moments,
    refit_layer,
)
from .layer import KANLinear
from .occupancy import Occupancy
from .shared import SharedFunctionLinear, SharedFunctions

__all__ = [
    "BASES",
    "RBF",
    "BSpline",
    "Basis",
    "Chebyshev",
    "Fourier",
    "Hermite",
    "Implicit",
    "KANLinear",
    "Legendre",
    "Occupancy",
    "Rational",
    "Refit",
    "SharedFunctionLinear",
    "SharedFunctions",
    "Wavelet",
    "adapt_layer",
    "decoding",
    "grid_from_quantiles",
    "input_quantiles",
    "refine_layer",
    "refine_moments",
    "refit_layer",
]
