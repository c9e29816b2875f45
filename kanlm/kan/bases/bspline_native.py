"""B-splines and their slopes in one pass over the inputs, by bspline.cpp.

Eager torch makes a pass over memory for every step of the formulas, and several to put the few
functions over an input's cell among all. Where C++ can be compiled, inputs go through all steps in
registers.
"""

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from .. import native
from ..knots import equally_spaced


@dataclass(frozen=True)
class Spline:
    """B-splines of a degree on one grid.

    Attributes:
        grid: (cells + 1,), contiguous float32. Where cells are not equal it is a view of all
            knots, of which `degree` more lie beside each end.
        degree: 0 to 5.
        equal_cells: all cells are as wide as the first and last knot say.
    """

    grid: Tensor
    degree: int
    equal_cells: bool

    @classmethod
    def on(cls, knots: Tensor, degree: int, equal_cells: bool) -> Self:
        """Over all knots, (1, cells + 2 degree + 1), of which equal cells take the grid's ends."""
        inner = knots.contiguous()[:, degree : knots.shape[1] - degree]
        if equal_cells:
            inner = equally_spaced(inner[:, [0, -1]], inner.shape[1] - 1, 0)
        return cls(inner[0], degree, equal_cells)

    @property
    def num_functions(self) -> int:
        return len(self.grid) - 1 + self.degree

    @staticmethod
    def can(x: Tensor) -> bool:
        """Whether inputs like x can be taken here: float32 on a CPU, and a compiler."""
        return native.holds_floats(x) and _library() is not None

    def write_values(self, x: Tensor, to: Tensor) -> None:
        """See `Differentiable.write_values`."""
        native.call(_library().bspline_values, [self._structure], x, to)

    def pull_back(self, x: Tensor, gradients: Tensor) -> Tensor:
        """See `Differentiable.pull_back`."""
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        arguments = x, gradients.to(x.dtype), dx
        native.call(_library().bspline_pull_back, [self._structure], *arguments)
        return dx

    @property
    def _structure(self) -> "_Structure":
        cells = len(self.grid) - 1
        return _Structure(self.degree, cells, self.equal_cells, self.grid.data_ptr())


class _Structure(ctypes.Structure):
    """`Spline` of bspline.cpp."""

    _fields_ = (
        ("degree", ctypes.c_int64),
        ("cells", ctypes.c_int64),
        ("equal", ctypes.c_int64),
        ("grid", ctypes.c_void_p),
    )


@functools.cache
def _library() -> Any:
    library = native.load_library(Path(__file__).with_name("bspline.cpp"))
    if library is None:
        return None
    native.declare(library.bspline_values, [ctypes.POINTER(_Structure)], tensors=2)
    native.declare(library.bspline_pull_back, [ctypes.POINTER(_Structure)], tensors=3)
    return library
