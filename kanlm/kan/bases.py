"""Bases: the functions of which an edge's learned function is a linear combination.

A basis turns x (…, in) into the values of its B functions, (…, in, B). Adding one is one
subclass of `Basis` and one line in `BASES`; its options are the keyword arguments of its
`__init__`.
"""

from abc import ABC, abstractmethod
from functools import cached_property

import torch
from torch import Tensor, nn

from .moments import unit_normal_mean
from .piecewise_linear import contract_piecewise_linear


class Basis(nn.Module, ABC):
    """B functions of one variable, evaluated on every input channel.

    State that must survive saving (knots, centres) is a persistent buffer or a parameter,
    and `reset_parameters` restores the start of both.
    """

    #: B, the number of functions and so of coefficients an edge.
    num_functions: int
    #: FLOPs of evaluating all functions at one input: every addition, multiplication,
    #: division, comparison and transcendental counts one, as the formula is written.
    flops_per_input: int

    @property
    @abstractmethod
    def label(self) -> str:
        """Name of kind and size in reports, such as `bspline1-g6`."""

    @abstractmethod
    def values(self, x: Tensor) -> Tensor:
        """Evaluate all functions: (…, in) → (…, in, B), in the dtype of x.

        The result is best laid out with `in` innermost, as a transposed view of
        (…, B, in), because `contract` then needs no copy.
        """

    @abstractmethod
    def starting_values(self, x: Tensor) -> Tensor:
        """`values` of a freshly reset basis, for x on the CPU in float64.

        Layers ask this for their starting scale, also while the basis itself is on the
        meta device and holds no numbers.
        """

    @abstractmethod
    def reset_parameters(self) -> None:
        """Put parameters and buffers back to their start."""

    @cached_property
    def mean_square(self) -> float:
        """E[Σ_b φ_b(z)²] for z ~ N(0, 1) at the start."""
        return unit_normal_mean(lambda z: self.starting_values(z).square().sum(-1))

    def contract(self, x: Tensor, coefficients: Tensor) -> Tensor:
        """Sum every edge's function: y_o = Σ_i Σ_b φ_b(x_i) c_ibo.

        One matrix product over the flattened (in, B). A basis that knows a cheaper way
        overrides this, and must agree with it.

        Arguments:
            x: (…, in).
            coefficients: (in, B, out).

        Returns: (…, out).
        """
        functions_first = self.values(x).transpose(-1, -2).flatten(-2)
        return functions_first @ coefficients.transpose(0, 1).flatten(0, 1)


class BSpline(Basis):
    """B-splines of degree 1 to 3 on a uniform grid, in closed form.

    A B-spline is local: at x only the degree + 1 functions above x's grid cell differ
    from zero, and on the cell each is a polynomial of the position t ∈ [0, 1] in it
    (de Boor, A Practical Guide to Splines, 2001, ch. IX and X). They sum to one, so the
    span holds constants, and a layer over it needs no bias.

    Outside the grid every function goes on linearly, with its value and slope at the
    grid's end: a raw B-spline would be 0 there, with no gradient to come back by.

    Arguments:
        grid_size: number of equal cells G; there are G + degree functions.
        degree: 1 (piecewise linear), 2 or 3.
        grid_range: ends of the grid. Inputs are expected normalised: (-3, 3) holds
            99.7% of a unit normal.

    Raises:
        ValueError: an option is out of its range.
    """

    knots: Tensor

    def __init__(
        self,
        *,
        grid_size: int = 6,
        degree: int = 1,
        grid_range: tuple[float, float] = (-3.0, 3.0),
    ) -> None:
        super().__init__()
        if grid_size < 1:
            raise ValueError(f"grid_size = {grid_size}: expected at least 1")
        if degree not in (1, 2, 3):
            raise ValueError(f"degree = {degree}: expected 1, 2 or 3")
        low, high = grid_range
        if not low < high:
            raise ValueError(f"grid_range = {list(grid_range)}: expected low < high")
        self.grid_size = grid_size
        self.degree = degree
        self.grid_range = (float(low), float(high))
        self.num_functions = grid_size + degree
        # Finding the cell, the position in it, its clamp and the tail; the pieces.
        self.flops_per_input = grid_size + 6 + (degree + 1) * (2 * degree + 3)
        self.register_buffer("knots", torch.empty(grid_size + 2 * degree + 1))
        self.reset_parameters()

    @property
    def label(self) -> str:
        return f"bspline{self.degree}-g{self.grid_size}"

    def extra_repr(self) -> str:
        return f"grid_size={self.grid_size}, degree={self.degree}, grid_range={self.grid_range}"

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.knots.copy_(self._uniform_knots())

    def values(self, x: Tensor) -> Tensor:
        return _spline_values(x, self.knots, self.degree)

    def contract(self, x: Tensor, coefficients: Tensor) -> Tensor:
        # The clamps pay where nothing fuses the expansion: eager float32 on a CPU.
        if (
            self.degree == 1
            and x.device.type == "cpu"
            and x.dtype in (torch.float32, torch.float64)
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
        ):
            return contract_piecewise_linear(x, self.knots[1:-1], coefficients)
        return super().contract(x, coefficients)

    def starting_values(self, x: Tensor) -> Tensor:
        return _spline_values(x, self._uniform_knots(), self.degree)

    def _uniform_knots(self) -> Tensor:
        """The extended knot vector, `degree` knots beyond each end, in float64 on the CPU."""
        low, high = self.grid_range
        steps = torch.arange(
            -self.degree, self.grid_size + self.degree + 1, dtype=torch.float64, device="cpu"
        )
        return low + (high - low) / self.grid_size * steps


def _spline_values(x: Tensor, knots: Tensor, degree: int) -> Tensor:
    """All B-splines of `degree` on uniform `knots`: (…, in) → (…, in, B)."""
    knots = knots.to(x.dtype)
    grid = knots[degree : knots.numel() - degree]
    # The cell right of a knot owns it, and the outer cells own the tails.
    cell = torch.bucketize(x.detach().contiguous(), grid[1:-1], right=True)
    t = (x - grid[cell]) / (grid[1] - grid[0])
    inside = t.clamp(0, 1)
    pieces, slopes = _cell_polynomials(inside, degree)
    tail = t - inside
    local = torch.stack(
        [piece + slope * tail for piece, slope in zip(pieces, slopes, strict=True)], dim=-2
    )
    offsets = torch.arange(degree + 1, device=x.device).unsqueeze(-1)
    dense = local.new_zeros(*x.shape[:-1], knots.numel() - degree - 1, x.shape[-1])
    return dense.scatter(-2, cell.unsqueeze(-2) + offsets, local).transpose(-1, -2)


def _cell_polynomials(t: Tensor, degree: int) -> tuple[list[Tensor], list[Tensor]]:
    """The degree + 1 functions alive on a cell, and their slopes, at t ∈ [0, 1] in it."""
    s = 1 - t
    if degree == 1:
        one = torch.ones_like(t)
        return [s, t], [-one, one]
    if degree == 2:
        return [s * s / 2, 0.5 + t * s, t * t / 2], [-s, s - t, t]
    return (
        [
            s * s * s / 6,
            (4 - 3 * t * t * (1 + s)) / 6,
            (4 - 3 * s * s * (1 + t)) / 6,
            t * t * t / 6,
        ],
        [-s * s / 2, t * (3 * t - 4) / 2, s * (4 - 3 * s) / 2, t * t / 2],
    )


#: Bases by the `kind` of their settings.
BASES: dict[str, type[Basis]] = {
    "bspline": BSpline,
}
