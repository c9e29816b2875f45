"""Radial functions around equally spaced centres."""

import math
from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from .base import Outside, Smooth
from .cpp_formulas import CppFormulas

Shape = Literal["gaussian", "hat"]


class RBF(Smooth):
    """Radial basis functions φ_b(x) = ψ((x − c_b) / (width · h)) around centres c_b, h apart.

        gaussian:  ψ(u) = exp(−u²)        (fast-kan's, with width = 1; Li, arXiv 2405.06721)
        hat:       ψ(u) = max(1 − |u|, 0)

    The centres are equally spaced over the range, its ends included. Unlike B-splines the
    functions of either shape need not sum to one.

    In bfloat16 a value inside the range is the exact one rounded, within 2⁻⁸ |value| + 10⁻⁵.

    Args:
        centers: number of functions.
        shape: ψ.
        width: reach of a function, in distances between centres.
        half_width: R; the range is (−R, R).
        outside: `linear` or `squash`.
    """

    in_a_row = True

    def __init__(
        self,
        channels: int | None = None,
        *,
        centers: int = 7,
        shape: Shape = "gaussian",
        width: float = 1.0,
        half_width: float = 3.0,
        outside: Outside = "linear",
    ) -> None:
        if centers < 2:
            raise ValueError(f"centers = {centers}: expected at least 2")
        if shape not in get_args(Shape):
            raise ValueError(f"shape = {shape!r}: expected {' or '.join(get_args(Shape))}")
        if not 0 < width < math.inf:
            raise ValueError(f"width = {width}: expected a positive number")
        if outside == "periodic":
            raise ValueError("outside = 'periodic': expected linear or squash for RBF")
        self.shape: Shape = shape
        self.width = float(width)
        super().__init__(centers, half_width, outside)
        self.flops_per_input = centers * (4 if shape == "hat" else 6) + 3

    @property
    def size_label(self) -> str:
        return (
            f"rbf{self.num_functions}" if self.shape == "gaussian" else f"hat{self.num_functions}"
        )

    def functions(self, x: Tensor, parameters: Mapping[str, Tensor]) -> list[Tensor]:
        if self.shape == "gaussian":
            return [torch.exp(-u * u) for u in self._distances(x)]
        return [
            torch.where(rising, 1 + u, torch.where(falling, 1 - u, 0.0))
            for u, rising, falling in self._sides(x)
        ]

    def slopes(self, x: Tensor, parameters: Mapping[str, Tensor]) -> list[Tensor]:
        if self.shape == "gaussian":
            return [-2 / self._reach * u * torch.exp(-u * u) for u in self._distances(x)]
        return [
            (rising.to(x.dtype) - falling.to(x.dtype)) / self._reach
            for _, rising, falling in self._sides(x)
        ]

    def cpp_formulas(self) -> CppFormulas | None:
        if self.shape != "gaussian" or self.outside != "linear":
            return None
        numbers = (-self.half_width, self._step, self._reach, self.half_width)
        return CppFormulas("gaussians", self.num_functions, numbers)

    def _sides(self, x: Tensor):
        """u, and whether it is on the rising and on the falling side of each hat.

        A kink belongs to the side on its right, but at the end of the range to the one on its
        left, with whose slope the hat goes on.
        """
        end = x >= self.half_width
        for u in self._distances(x):
            rising = (u >= -1) & (u < 0) & ~end | (u > -1) & (u <= 0) & end
            falling = (u >= 0) & (u < 1) & ~end | (u > 0) & (u <= 1) & end
            yield u, rising, falling

    @property
    def _reach(self) -> float:
        return self.width * self._step

    @property
    def _step(self) -> float:
        return 2 * self.half_width / (self.num_functions - 1)

    def _distances(self, x: Tensor) -> list[Tensor]:
        centers = [-self.half_width + self._step * b for b in range(self.num_functions)]
        return [(x - center) / self._reach for center in centers]
