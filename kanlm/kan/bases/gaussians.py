"""Gaussians and their slopes in one pass over the inputs, by gaussians.cpp.

Eager torch makes several passes over memory for every centre. Where C++ can be compiled, inputs
go by all centres in registers.
"""

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import native


@dataclass(frozen=True, kw_only=True)
class Gaussians:
    """exp(−u²) with u = (x − first − b step) / reach for b < functions.

    Attributes:
        first, step, reach: as above.
        limit: inputs beyond ± limit are clamped, and functions go on linearly.
    """

    functions: int
    first: float
    step: float
    reach: float
    limit: float

    @staticmethod
    def can(x: Tensor) -> bool:
        """Whether inputs like x can be taken here: float32 on a CPU, and a compiler."""
        return native.holds_floats(x) and _library() is not None

    def write_values(self, x: Tensor, to: Tensor) -> None:
        """See `Differentiable.write_values`."""
        native.call(_library().gaussian_values, [self._structure], x, to)

    def pull_back(self, x: Tensor, gradients: Tensor) -> Tensor:
        """See `Differentiable.pull_back`."""
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        arguments = x, gradients.to(x.dtype), dx
        native.call(_library().gaussian_pull_back, [self._structure], *arguments)
        return dx

    @property
    def _structure(self) -> "_Structure":
        return _Structure(self.functions, self.first, self.step, self.reach, self.limit)


class _Structure(ctypes.Structure):
    """`Gaussians` of gaussians.cpp."""

    _fields_ = (
        ("functions", ctypes.c_int64),
        *((name, ctypes.c_float) for name in ("first", "step", "reach", "limit")),
    )


@functools.cache
def _library() -> Any:
    library = native.load_library(Path(__file__).with_name("gaussians.cpp"))
    if library is None:
        return None
    native.declare(library.gaussian_values, [ctypes.POINTER(_Structure)], tensors=2)
    native.declare(library.gaussian_pull_back, [ctypes.POINTER(_Structure)], tensors=3)
    return library
