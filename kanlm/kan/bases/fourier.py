"""Sines and cosines."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .base import Smooth
from .cpp_formulas import CppFormulas


class Fourier(Smooth):
    """√2 sin(k ω x) and √2 cos(k ω x) for k = 1 … frequencies, with ω = π / half_width.

    A truncated Fourier series of period 2 half_width, orthonormal over it. Outside the range
    it repeats itself. The constant is left to the layer's bias.

    In bfloat16 a value inside the range is the exact one rounded, within 2⁻⁸ |value| + 10⁻⁵ up
    to 32 frequencies.

    Args:
        frequencies: K; there are 2 K functions.
        half_width: half a period.
    """

    unsaid_outside = "periodic"

    def __init__(
        self,
        channels: int | None = None,
        *,
        frequencies: int = 3,
        half_width: float = 4.0,
    ) -> None:
        if frequencies < 1:
            raise ValueError(f"frequencies = {frequencies}: expected at least 1")
        self.frequencies = frequencies
        super().__init__(2 * frequencies, half_width, "periodic")
        self.flops_per_input = 5 * frequencies

    @property
    def size_label(self) -> str:
        return f"fourier{self.frequencies}"

    def functions(self, x: Tensor, parameters: Mapping[str, Tensor]) -> list[Tensor]:
        root = math.sqrt(2)
        angles = self._angles(x)
        return [root * f(angle) for angle in angles for f in (torch.sin, torch.cos)]

    def slopes(self, x: Tensor, parameters: Mapping[str, Tensor]) -> list[Tensor]:
        unit = math.sqrt(2) * math.pi / self.half_width
        columns = []
        for k, angle in enumerate(self._angles(x), start=1):
            columns += [k * unit * torch.cos(angle), -k * unit * torch.sin(angle)]
        return columns

    def cpp_formulas(self) -> CppFormulas:
        return CppFormulas("fourier", self.num_functions, (self.half_width,))

    def _angles(self, x: Tensor) -> list[Tensor]:
        """k ω x; x is first brought into one period, where low precision still resolves it."""
        period = 2 * self.half_width
        phase = (x - period * torch.round(x / period)) * (math.pi / self.half_width)
        return [k * phase for k in range(1, self.frequencies + 1)]
