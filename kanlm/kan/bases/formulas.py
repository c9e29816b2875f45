"""A basis's functions in C++, for float32 inputs on a CPU.

Eager torch makes a pass over memory for every step of a formula. In the C++ files of this folder a
few neighbouring inputs go through all steps in registers; formulas.h says what each file holds.
"""

import ctypes
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import native


class Formulas(NamedTuple):
    """Functions of one of the C++ files.

    Attributes:
        source: name of the file, without its ending.
        num_functions: B.
        numbers: options, in the order that the file states.
        knots: (K,), contiguous float32, of a basis that has some.
    """

    source: str
    num_functions: int
    numbers: tuple[float, ...]
    knots: Tensor | None = None

    def can(self, x: Tensor) -> bool:
        """Whether inputs like x can be taken here: float32 on a CPU, and a compiler."""
        return native.holds_floats(x) and self.library is not None

    def write_values(self, x: Tensor, to: Tensor) -> None:
        """See `Differentiable.write_values`."""
        native.call(self.library.values, [self.structure], x, to)

    def pull_back(self, x: Tensor, gradients: Tensor) -> Tensor:
        """See `Differentiable.pull_back`."""
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        native.call(self.library.pull_back, [self.structure], x, gradients.to(x.dtype), dx)
        return dx

    @property
    def library(self) -> Any:
        """`values` and `pull_back` of formulas.h; None where they cannot be compiled."""
        source = Path(__file__).with_name(f"{self.source}.cpp")
        library = native.load_library(source, "values", "pull_back")
        # Of the two the last to be declared, for a thread beside this one.
        if library is not None and library.pull_back.argtypes is None:
            for function, tensors in ((library.values, 2), (library.pull_back, 3)):
                native.declare(function, [ctypes.POINTER(_Structure)], tensors=tensors)
        return library

    @property
    def structure(self) -> "_Structure":
        """What the library's functions take; the knots have to live as long."""
        numbers = (ctypes.c_float * len(self.numbers))(*self.numbers)
        knots = None if self.knots is None else self.knots.data_ptr()
        return _Structure(self.num_functions, numbers, knots)


class _Structure(ctypes.Structure):
    """`Formulas` of formulas.h."""

    _fields_ = (
        ("functions", ctypes.c_int64),
        ("numbers", ctypes.POINTER(ctypes.c_float)),
        ("knots", ctypes.c_void_p),
    )
