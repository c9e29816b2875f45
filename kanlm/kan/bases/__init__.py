"""Bases: the functions of which an edge's learned function is a linear combination.

Adding one is one subclass of `Basis`, or of `Smooth`, which extends formulas beyond their
range, and one line in `BASES`; its options are the keyword-only arguments of its `__init__`.
"""

from .base import Adaptable, Basis, Curved, Differentiable, Local, Outside, Refinable, Smooth
from .bspline import BSpline
from .fourier import Fourier
from .implicit import Implicit
from .polynomials import Chebyshev, Hermite, Legendre
from .rational import Rational
from .rbf import RBF
from .wavelet import Wavelet

#: Bases by the `kind` of their settings.
BASES: dict[str, type[Basis]] = {
    "bspline": BSpline,
    "rbf": RBF,
    "chebyshev": Chebyshev,
    "legendre": Legendre,
    "hermite": Hermite,
    "fourier": Fourier,
    "wavelet": Wavelet,
    "rational": Rational,
    "implicit": Implicit,
}

__all__ = [
    "BASES",
    "RBF",
    "Adaptable",
    "BSpline",
    "Basis",
    "Chebyshev",
    "Curved",
    "Differentiable",
    "Fourier",
    "Hermite",
    "Implicit",
    "Legendre",
    "Local",
    "Outside",
    "Rational",
    "Refinable",
    "Smooth",
    "Wavelet",
]
