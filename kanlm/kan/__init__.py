"""Kolmogorov-Arnold layers for any torch model. Imports torch alone."""

from .bases import BASES, Basis, BSpline
from .layer import KANLinear

__all__ = ["BASES", "BSpline", "Basis", "KANLinear"]
