"""Orthogonal polynomials by their three-term recurrences.

`acos` and powers are avoided: the recurrences are stable and have finite derivatives
everywhere (Chebyshev through `acos` has none at ±1). The constant function is left out
unless it is asked for: on every edge it would do what one bias of the layer does.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .base import Outside, Smooth
from .cpp_formulas import CppFormulas
from .tanh import DENOMINATOR, LIMIT, NUMERATOR


class Recurrence(NamedTuple):
    """p_0 = 1, p_1 = first u, p_{n+1} = a_n u p_n − c_n p_{n−1} with u = scale x; the functions
    are w_n p_n.

    Attributes:
        first, scale: as above.
        a, c: by n from 0 to degree − 1, the first of each unused.
        weights: w_0 … w_degree.
    """

    first: float
    scale: float
    a: list[float]
    c: list[float]
    weights: list[float]


class Polynomials(Smooth):
    """Polynomials p_1 … p_degree of the input, and p_0 with `constant`."""

    #: Name in labels.
    name: str
    default_base = None

    def __init__(self, degree: int, constant: bool, half_width: float, outside: Outside) -> None:
        if degree < 1:
            raise ValueError(f"degree = {degree}: expected at least 1")
        if outside == "periodic":
            raise ValueError("outside = 'periodic': expected linear or squash for polynomials")
        self.degree = degree
        self.spans_constants = constant
        super().__init__(degree + constant, half_width, outside)
        extension = 2 if outside == "squash" else 3 + 2 * self.num_functions
        self.flops_per_input = extension + 4 * max(degree - 1, 1)

    @property
    def size_label(self) -> str:
        return f"{self.name}{'0' if self.spans_constants else ''}{self.degree}"

    def functions(self, x: Tensor, parameters: Mapping[str, Tensor]) -> list[Tensor]:
        columns = self._polynomials(x)
        return columns if self.spans_constants else columns[1:]

    def slopes(self, x: Tensor, parameters: Mapping[str, Tensor]) -> list[Tensor]:
        columns = self._polynomial_slopes(x)
        return columns if self.spans_constants else columns[1:]

    def cpp_formulas(self) -> CppFormulas | None:
        first, scale, a, c, weights = self.recurrence()
        options = first, scale, self.half_width, self.spans_constants, self.outside == "squash"
        numbers = (*options, LIMIT, *NUMERATOR, *DENOMINATOR, *a, *c, *weights)
        return CppFormulas("recurrence", self.num_functions, tuple(map(float, numbers)))

    @abstractmethod
    def recurrence(self) -> Recurrence:
        """The same polynomials, for recurrence.cpp."""

    @abstractmethod
    def _polynomials(self, x: Tensor) -> list[Tensor]:
        """p_0 … p_degree."""

    @abstractmethod
    def _polynomial_slopes(self, x: Tensor) -> list[Tensor]:
        """Their derivatives by x."""


class Chebyshev(Polynomials):
    """Chebyshev polynomials of the first kind on the range.

        T_0 = 1,  T_1 = u,  T_{n+1} = 2 u T_n − T_{n−1},  T_n′ = n U_{n−1},  u = x / half_width

    (DLMF 18.9.1, 18.9.21). Beyond the range inputs are squashed by default.

    In bfloat16 a value inside the range is the exact one rounded, within 2⁻⁸ |value| + 10⁻⁵.

    Args:
        degree: highest degree.
        constant: keep T_0.
        half_width: R; with `squash`, u = tanh(x / R).
        outside: `squash` or `linear`.
    """

    name = "chebyshev"
    unsaid_outside = "squash"

    def __init__(
        self,
        channels: int | None = None,
        *,
        degree: int = 4,
        constant: bool = False,
        half_width: float = 5 / 3,
        outside: Outside = "squash",
    ) -> None:
        super().__init__(degree, constant, half_width, outside)

    def recurrence(self) -> Recurrence:
        return Recurrence(
            first=1.0,
            scale=1 / self.half_width,
            a=[2.0] * self.degree,
            c=[1.0] * self.degree,
            weights=[1.0] * (self.degree + 1),
        )

    def _polynomials(self, x: Tensor) -> list[Tensor]:
        u = x / self.half_width
        return _recur(u, u, self.degree)

    def _polynomial_slopes(self, x: Tensor) -> list[Tensor]:
        u = x / self.half_width
        second_kind = _recur(u, 2 * u, self.degree - 1)
        slopes = [n * s / self.half_width for n, s in enumerate(second_kind, start=1)]
        return [x.new_zeros(x.shape), *slopes]


def _recur(u: Tensor, first: Tensor, degree: int) -> list[Tensor]:
    """p_0 = 1, p_1 = first, p_{n+1} = 2 u p_n − p_{n−1}, up to `degree`."""
    columns = [u.new_ones(u.shape), first]
    twice = 2 * u
    while len(columns) <= degree:
        columns.append(twice * columns[-1] - columns[-2])
    return columns[: degree + 1]


class Legendre(Polynomials):
    """Legendre polynomials on the range, scaled to unit mean square over it.

        (n + 1) P_{n+1} = (2n + 1) u P_n − n P_{n−1},  P′_{n+1} = P′_{n−1} + (2n + 1) P_n

    times √(2n + 1), with u = x / half_width (DLMF 18.9.1, 18.9.7, 18.9.19). Beyond the range inputs
    are squashed by default.

    In bfloat16 a value inside the range is the exact one rounded, within 2⁻⁸ |value| + 10⁻⁵ up
    to degree 16.

    Args: as of `Chebyshev`.
    """

    name = "legendre"
    unsaid_outside = "squash"

    def __init__(
        self,
        channels: int | None = None,
        *,
        degree: int = 4,
        constant: bool = False,
        half_width: float = 5 / 3,
        outside: Outside = "squash",
    ) -> None:
        super().__init__(degree, constant, half_width, outside)

    def recurrence(self) -> Recurrence:
        return Recurrence(
            first=1.0,
            scale=1 / self.half_width,
            a=[(2 * n + 1) / (n + 1) for n in range(self.degree)],
            c=[n / (n + 1) for n in range(self.degree)],
            weights=[math.sqrt(2 * n + 1) for n in range(self.degree + 1)],
        )

    def _polynomials(self, x: Tensor) -> list[Tensor]:
        return _scaled(self._unscaled(x / self.half_width))

    def _polynomial_slopes(self, x: Tensor) -> list[Tensor]:
        columns = self._unscaled(x / self.half_width)
        slopes = [x.new_zeros(x.shape), x.new_full(x.shape, 1 / self.half_width)]
        for n in range(1, self.degree):
            slopes.append(slopes[n - 1] + (2 * n + 1) / self.half_width * columns[n])
        return _scaled(slopes)

    def _unscaled(self, u: Tensor) -> list[Tensor]:
        columns = [u.new_ones(u.shape), u]
        for n in range(1, self.degree):
            columns.append(((2 * n + 1) * u * columns[n] - n * columns[n - 1]) / (n + 1))
        return columns


def _scaled(columns: list[Tensor]) -> list[Tensor]:
    return [math.sqrt(2 * n + 1) * column for n, column in enumerate(columns)]


class Hermite(Polynomials):
    """Probabilists' Hermite polynomials, orthonormal under a unit normal.

        He_0 = 1,  He_1 = x,  He_{n+1} = x He_n − n He_{n−1},  He_n′ = n He_{n−1}

    divided by √n! (DLMF 18.9.1, 18.9.27); written for the scaled h_n = He_n / √n! as
    h_{n+1} = (x h_n − √n h_{n−1}) / √(n + 1) and h_n′ = √n h_{n−1}. For normalised inputs
    each function has unit mean square and is uncorrelated with the others, but for what the
    squashing of inputs changes. Beyond the range inputs are squashed by default: functions that
    grow with the cube of an outlier, or on and on along its line, trained worse (the tables of
    configs/README.md).

    In bfloat16 a value inside the range is the exact one rounded, within 2⁻⁸ |value| + 10⁻⁵.

    Args: as of `Chebyshev`; the polynomials' variable is x itself, R tanh(x / R) with
    `squash`.
    """

    name = "hermite"

    def __init__(
        self,
        channels: int | None = None,
        *,
        degree: int = 3,
        constant: bool = False,
        half_width: float = 3.0,
        outside: Outside = "squash",
    ) -> None:
        super().__init__(degree, constant, half_width, outside)

    def recurrence(self) -> Recurrence:
        return Recurrence(
            first=1.0,
            scale=1.0,
            a=[math.sqrt(1 / (n + 1)) for n in range(self.degree)],
            c=[math.sqrt(n / (n + 1)) for n in range(self.degree)],
            weights=[1.0] * (self.degree + 1),
        )

    def _polynomials(self, x: Tensor) -> list[Tensor]:
        columns = [x.new_ones(()), x]
        for n in range(1, self.degree):
            last = columns[n - 1] * -math.sqrt(n / (n + 1))
            columns.append(torch.addcmul(last, x, columns[n], value=math.sqrt(1 / (n + 1))))
        return columns

    def _polynomial_slopes(self, x: Tensor) -> list[Tensor]:
        columns = self._polynomials(x)
        slopes = [math.sqrt(n) * columns[n - 1] for n in range(1, self.degree + 1)]
        return [x.new_zeros(()), *slopes]
