"""Polynomials of a three-term recurrence in one pass over the inputs, by recurrence.cpp.

Eager torch makes a pass over memory for every step of a recurrence. Where C++ can be compiled, a
row of inputs goes through all steps in the first cache.
"""

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import native
from .tanh import DENOMINATOR, LIMIT, NUMERATOR


@dataclass(frozen=True, kw_only=True)
class Recurrence:
    """p_0 = 1, p_1 = first u, p_{n+1} = a_n u p_n − c_n p_{n−1} with u = scale x; the functions
    are w_n p_n for n from 0 or 1 to the degree.

    Attributes:
        first, scale: as above.
        limit: inputs x beyond ± limit are clamped, and functions go on linearly; with squash
            all are bent, limit · tanh(x / limit).
        a, c: by n, the first of each unused.
        weights: w_0 … w_degree.
        constant: whether there is a function for n = 0.
    """

    first: float
    scale: float
    limit: float
    a: Sequence[float]
    c: Sequence[float]
    weights: Sequence[float]
    constant: bool
    squash: bool

    @staticmethod
    def can(x: Tensor) -> bool:
        """Whether inputs like x can be taken here: float32 on a CPU, and a compiler."""
        return native.holds_floats(x) and _library() is not None

    def write_values(self, x: Tensor, to: Tensor) -> None:
        """See `Differentiable.write_values`."""
        native.call(_library().polynomial_values, [self._structure], x, to)

    def pull_back(self, x: Tensor, gradients: Tensor) -> Tensor:
        """See `Differentiable.pull_back`."""
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        arguments = x, gradients.to(x.dtype), dx
        native.call(_library().polynomial_pull_back, [self._structure], *arguments)
        return dx

    @cached_property
    def _structure(self) -> "_Structure":
        return _Structure(
            degree=len(self.weights) - 1,
            constant=self.constant,
            squash=self.squash,
            first=self.first,
            scale=self.scale,
            limit=self.limit,
            a=_floats(self.a),
            c=_floats(self.c),
            weights=_floats(self.weights),
            tanh_limit=LIMIT,
            numerator=NUMERATOR,
            denominator=DENOMINATOR,
        )


class _Structure(ctypes.Structure):
    """`Recurrence` of recurrence.cpp."""

    _fields_ = [
        *[(name, ctypes.c_int64) for name in ("degree", "constant", "squash")],
        *[(name, ctypes.c_float) for name in ("first", "scale", "limit")],
        *[(name, ctypes.POINTER(ctypes.c_float)) for name in ("a", "c", "weights")],
        ("tanh_limit", ctypes.c_float),
        ("numerator", ctypes.c_float * len(NUMERATOR)),
        ("denominator", ctypes.c_float * len(DENOMINATOR)),
    ]


def _floats(numbers: Sequence[float]) -> "ctypes.Array[ctypes.c_float]":
    return (ctypes.c_float * len(numbers))(*numbers)


@functools.cache
def _library() -> Any:
    library = native.load_library(Path(__file__).with_name("recurrence.cpp"))
    if library is None:
        return None
    native.declare(library.polynomial_values, [ctypes.POINTER(_Structure)], tensors=2)
    native.declare(library.polynomial_pull_back, [ctypes.POINTER(_Structure)], tensors=3)
    return library
