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
from .layer import KANLinear

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
    "Rational",
    "Wavelet",
]
