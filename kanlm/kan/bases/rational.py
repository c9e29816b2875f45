"""Rational functions with learned denominators."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .base import Outside, Smooth
from .cpp_formulas import CppFormulas


class Rational(Smooth):
    """Rational functions in the safe Padé form (Molina et al., arXiv 1907.06732, eq. 3).

        φ_b(x) = u^b / (1 + |d_1 u + … + d_q u^q|),   b = 0 … p,   u = x / half_width

    The denominator has no zero, so the function no pole. An edge's coefficients are its
    numerator; each input channel has its own denominator d, shared by the channel's edges.
    The slope jumps where the polynomial inside | | crosses zero, unless d is 0 there.

    The denominators start at d = (0, 1, 0, …), 1 / (1 + u²), a smooth bump.

    In bfloat16 a value inside the range is the exact one rounded, within 2⁻⁸ |value| + 10⁻⁵ for
    the parameters as they are (bfloat16 rounds those, too).

    Args:
        numerator: degree p.
        denominator: degree q.
        half_width: R; the range is (−R, R).
        outside: `linear` or `squash`.
        per_channel: give each of `channels` parameters of its own; otherwise they share.
    """

    denominators: Tensor

    def __init__(
        self,
        channels: int | None = None,
        *,
        numerator: int = 3,
        denominator: int = 2,
        half_width: float = 3.0,
        outside: Outside = "linear",
        per_channel: bool = True,
    ) -> None:
        if numerator < 0:
            raise ValueError(f"numerator = {numerator}: expected a degree of 0 or more")
        if denominator < 1:
            raise ValueError(f"denominator = {denominator}: expected a degree of 1 or more")
        if outside == "periodic":
            raise ValueError("outside = 'periodic': expected linear or squash for Rational")
        self.numerator = numerator
        self.denominator = denominator
        super().__init__(numerator + 1, half_width, outside, channels if per_channel else None)
        self.flops_per_input = 2 * denominator + 2 + 2 * (numerator + 1) + 4

    @property
    def size_label(self) -> str:
        return f"rational{self.numerator}-{self.denominator}"

    def starting_parameters(self) -> dict[str, Tensor]:
        start = torch.zeros(self.denominator, 1, dtype=torch.float64, device="cpu")
        start[min(1, self.denominator - 1)] = 1
        return {"denominators": start}

    def functions(self, x: Tensor, parameters: Mapping[str, Tensor]) -> list[Tensor]:
        u = x / self.half_width
        inverse = 1 / (1 + self._polynomial(u, parameters).abs())
        return _times_powers(inverse, u, self.num_functions)

    def slopes(self, x: Tensor, parameters: Mapping[str, Tensor]) -> list[Tensor]:
        u = x / self.half_width
        inside = self._polynomial(u, parameters)
        inverse = 1 / (1 + inside.abs())
        rows = parameters["denominators"]
        derivative = torch.zeros_like(u)
        for power in range(self.denominator, 0, -1):
            derivative = derivative * u + power * rows[power - 1]
        # d/du u^b / Q = (b u^(b−1) − u^b Q′ / Q) / Q. Where the polynomial is 0, its sign is
        # that on the right.
        sign = torch.where(inside == 0, derivative.sign(), inside.sign())
        fall = sign * derivative * inverse
        powers = _times_powers(inverse, u, self.num_functions)
        rise = [torch.zeros_like(u), *(b * power for b, power in enumerate(powers[:-1], start=1))]
        columns = [a - fall * power for a, power in zip(rise, powers, strict=True)]
        return [column / self.half_width for column in columns]

    def cpp_formulas(self) -> CppFormulas | None:
        if self.outside != "linear":
            return None
        numbers = self.half_width, float(self.denominator)
        learned = self.denominators.detach().float().contiguous()
        return CppFormulas("rational", self.num_functions, numbers, learned=learned)

    def _polynomial(self, u: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """d_1 u + … + d_q u^q by Horner's rule."""
        total = torch.zeros_like(u)
        for row in reversed(parameters["denominators"]):
            total = (total + row) * u
        return total


def _times_powers(first: Tensor, u: Tensor, count: int) -> list[Tensor]:
    """first · u^b for b = 0 … count − 1."""
    columns = [first]
    while len(columns) < count:
        columns.append(columns[-1] * u)
    return columns
