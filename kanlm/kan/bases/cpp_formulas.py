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

from .. import plain_tensors
from ..cpp_build import load_library


class CppFormulas(NamedTuple):
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
        if not plain_tensors.is_cpu_float32(x) or not self.reads_plain_parameters:
            return False
        return self.library is not None

    @property
    def reads_plain_parameters(self) -> bool:
        """Whether parameters are where C++ reads them."""
        return self.learned is None or plain_tensors.is_cpu_float32(self.learned)

    def write_values(self, x: Tensor, to: Tensor) -> None:
        """See `Differentiable.write_values`."""
        _call(self.library.values, self.structure, x, to)

    def pull_back(self, x: Tensor, gradients: Tensor) -> Tensor:
        """See `Differentiable.pull_back`."""
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        _call(self.library.pull_back, self.structure, x, gradients.to(x.dtype), dx)
        return dx

    @property
    def library(self) -> Any:
        """`values` and `pull_back` of formulas.h; None where they cannot be compiled."""
        return _library(self.source)

    @property
    def addresses(self) -> tuple[int, int]:
        """Addresses of the two functions of `library`."""
        return _addresses(self.source)

    @property
    def structure(self) -> "_Structure":
        """What the library's functions take; knots and parameters have to live as long."""
        if self.knots is None and self.learned is None:
            return _constant(self.num_functions, self.numbers)
        return _structure(self.num_functions, self.numbers, self.knots, self.learned)


@functools.cache
def _library(source: str) -> Any:
    path = Path(__file__).with_name(f"{source}.cpp")
    library = load_library(path, "values", "pull_back")
    if library is not None:
        for function, tensors in ((library.values, 2), (library.pull_back, 3)):
            _declare(function, tensors)
    return library


def _declare(function: Any, tensors: int) -> None:
    """State the arguments that `_call` gives a function."""
    pointers = [ctypes.c_void_p, ctypes.c_int64] * tensors
    function.argtypes = [ctypes.POINTER(_Structure), *pointers, *[ctypes.c_int64] * 3]
    function.restype = None


def _call(function: Any, structure: "_Structure", x: Tensor, *others: Tensor) -> None:
    """Call a function of formulas.h: with every tensor's address and the distance between its
    rows, the number of rows, inputs and threads.

    Args:
        x: (N, in).
        others: (N, …), the last to be written to. Those that are read are copied where their
            rows are not contiguous.
    """
    *read, written = (x, *others)
    read = [t if t.numel() == 0 or t[0].is_contiguous() else t.contiguous() for t in read]
    assert written.numel() == 0 or written[0].is_contiguous()
    tensors = [part for t in (*read, written) for part in (t.data_ptr(), t.stride(0))]
    function(structure, *tensors, *x.shape, torch.get_num_threads())


@functools.cache
def _addresses(source: str) -> tuple[int, int]:
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
