"""A basis's functions in C++, for float32 inputs on a CPU.

Eager torch makes a pass over memory for every step of a formula. In the C++ files of this folder a
few neighbouring inputs go through all steps in registers; formulas.h says what each file holds.
"""

import ctypes
import functools
from collections.abc import Sequence
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
        learned: (K, channels or 1), contiguous float32, of a basis with parameters: what its file
            makes of them.
    """

    source: str
    num_functions: int
    numbers: tuple[float, ...]
    knots: Tensor | None = None
    learned: Tensor | None = None

    def can(self, x: Tensor) -> bool:
        """Whether inputs like x can be taken here: float32 on a CPU, and a compiler."""
        if not native.holds_floats(x) or not self.reads_plain_parameters:
            return False
        return self.library is not None

    @property
    def reads_plain_parameters(self) -> bool:
        """Whether parameters are where C++ reads them."""
        return self.learned is None or native.holds_floats(self.learned)

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
        return _library(self.source)

    @property
    def places(self) -> tuple[int, int]:
        """Where the two functions of `library` are."""
        return _places(self.source)

    @property
    def structure(self) -> "_Structure":
        """What the library's functions take; knots and parameters have to live as long."""
        if self.knots is None and self.learned is None:
            return _constant(self.num_functions, self.numbers)
        return _structure(self.num_functions, self.numbers, self.knots, self.learned)


@functools.cache
def _library(source: str) -> Any:
    path = Path(__file__).with_name(f"{source}.cpp")
    library = native.load_library(path, "values", "pull_back")
    if library is not None:
        for function, tensors in ((library.values, 2), (library.pull_back, 3)):
            native.declare(function, [ctypes.POINTER(_Structure)], tensors=tensors)
    return library


@functools.cache
def _places(source: str) -> tuple[int, int]:
    library = _library(source)
    values, pull_back = (
        ctypes.cast(function, ctypes.c_void_p).value
        for function in (library.values, library.pull_back)
    )
    assert values is not None
    assert pull_back is not None
    return values, pull_back


def _structure(
    num_functions: int, numbers: Sequence[float], knots: Tensor | None, learned: Tensor | None
) -> "_Structure":
    return _Structure(
        num_functions,
        (ctypes.c_float * len(numbers))(*numbers),
        None if knots is None else knots.data_ptr(),
        None if learned is None else learned.data_ptr(),
        0 if learned is None else learned.shape[1],
    )


@functools.lru_cache(maxsize=256)
def _constant(num_functions: int, numbers: Sequence[float]) -> "_Structure":
    """The same structure again: making one takes as long as reading many weights."""
    return _structure(num_functions, numbers, None, None)


class _Structure(ctypes.Structure):
    """`Formulas` of formulas.h."""

    _fields_ = (
        ("functions", ctypes.c_int64),
        ("numbers", ctypes.POINTER(ctypes.c_float)),
        ("knots", ctypes.c_void_p),
        ("learned", ctypes.c_void_p),
        ("channels", ctypes.c_int64),
    )
