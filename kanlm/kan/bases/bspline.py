"""B-splines of any low degree, on equal cells or on free knots, in closed form."""

from typing import Self

import torch
from torch import Tensor

from ..initialization import assign_
from ..piecewise_linear import contract_piecewise_linear
from .base import Differentiable, Refinable, scatter_active


class BSpline(Refinable, Differentiable):
    """B-splines of degree 0 to 5.

    A B-spline is local: at x only the degree + 1 functions over x's grid cell differ from
    zero, and a triangle of degree (degree + 1) / 2 weighted means gives them all (de Boor,
    A Practical Guide to Splines, 2001, ch. X, algorithm BSPLVB). They sum to one, so the
    span holds constants, and a layer over it needs no bias.

    Outside the grid every function goes on linearly, with its value and slope at the
    grid's end: a raw B-spline would be 0 there, with no gradient to come back by. Degree 0
    is piecewise constant, and has no slope anywhere.

    In bfloat16 a value is within 0.02 of the exact one at the same input inside the range.

    Arguments:
        channels: number of inputs, where each is to have a grid of its own.
        grid_size: number of cells G; there are G + degree functions.
        degree: 0 to 5.
        grid_range: ends of the grid at the start. Inputs are expected normalised: (-3, 3)
            holds 99.7% of a unit normal.
        equal_cells: the cells are equally wide, which is faster. Without, each knot may
            move on its own, and the grid starts with equal cells.
        per_channel: give each of `channels` a grid; otherwise they share one.

    Raises:
        ValueError: an option is out of its range.
    """

    knots: Tensor
    spans_constants = True

    def __init__(
        self,
        channels: int | None = None,
        *,
        grid_size: int = 6,
        degree: int = 1,
        grid_range: tuple[float, float] = (-3.0, 3.0),
        equal_cells: bool = True,
        per_channel: bool = False,
    ) -> None:
        super().__init__()
        if grid_size < 1:
            raise ValueError(f"grid_size = {grid_size}: expected at least 1")
        if not 0 <= degree <= 5:
            raise ValueError(f"degree = {degree}: expected 0 to 5")
        low, high = grid_range
        if not low < high:
            raise ValueError(f"grid_range = {list(grid_range)}: expected low < high")
        self.grid_size = grid_size
        self.degree = degree
        self.grid_range = (float(low), float(high))
        self.equal_cells = equal_cells
        self.channels = channels if per_channel else None
        self.num_functions = grid_size + degree
        self.support = degree + 1
        # Finding the cell, the position in it, its clamp and the tail; the triangle.
        self.flops_per_input = grid_size + 6 + 5 * degree * (degree + 1) // 2 + 3 * degree + 1
        #: (channels or 1, G + 2 degree + 1), increasing; `degree` knots lie beyond each end.
        self.register_buffer("knots", torch.empty(self.channels or 1, grid_size + 2 * degree + 1))
        self.reset_parameters()

    @property
    def label(self) -> str:
        return f"bspline{self.degree}-g{self.grid_size}{'' if self.equal_cells else '-free'}"

    def extra_repr(self) -> str:
        return (
            f"grid_size={self.grid_size}, degree={self.degree}, grid_range={self.grid_range}, "
            f"equal_cells={self.equal_cells}"
        )

    @property
    def grid(self) -> Tensor:
        """The knots from one end of the grid to the other, (channels or 1, G + 1)."""
        return self.knots[:, self.degree : self.degree + self.grid_size + 1]

    def reset_parameters(self) -> None:
        assign_(self.knots, self._starting_knots())

    def active(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, values, _ = self._local(x, self.knots)
        return first, values

    def derivatives(self, x: Tensor) -> Tensor:
        first, _, slopes = self._local(x, self.knots)
        return scatter_active(first, slopes, self.num_functions)

    def starting_values(self, x: Tensor) -> Tensor:
        first, values, _ = self._local(x.unsqueeze(-1), self._starting_knots())
        return scatter_active(first, values, self.num_functions).squeeze(-2)

    def contract(self, x: Tensor, coefficients: Tensor) -> Tensor:
        # The clamps pay where nothing fuses the expansion: eager float32 on a CPU.
        if (
            self.degree == 1
            and len(self.knots) == 1
            and x.device.type == "cpu"
            and x.dtype in (torch.float32, torch.float64)
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
        ):
            return contract_piecewise_linear(x, self.grid[0], coefficients)
        return super().contract(x, coefficients)

    def refined(self, grid_size: int) -> tuple[Self, Tensor]:
        raise NotImplementedError

    def _starting_knots(self) -> Tensor:
        """Equal cells, (1, G + 2 degree + 1), in float64 on the CPU."""
        low, high = self.grid_range
        steps = torch.arange(
            -self.degree, self.grid_size + self.degree + 1, dtype=torch.float64, device="cpu"
        )
        return (low + (high - low) / self.grid_size * steps).unsqueeze(0)

    def _local(self, x: Tensor, knots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """First active function (…, in), values and slopes of the active, (…, in, support)."""
        degree, knots = self.degree, knots.to(x.dtype)
        grid = knots[:, degree : degree + self.grid_size + 1]
        cell = self._cell(x.detach(), grid)
        inside = torch.clamp(x, grid[:, 0], grid[:, -1])
        if self.equal_cells:
            # In units of a cell every weighted mean has a known denominator.
            width = (grid[:, -1] - grid[:, 0]) / self.grid_size
            t = (inside - _at(grid, cell)) / width
            below = [t + m for m in range(degree)]
            above = [m + 1 - t for m in range(degree)]
            values, slopes = _triangle(t, below, above, lambda j, r: float(j))
            slopes = [slope / width for slope in slopes]
        else:
            here = cell + degree
            below = [inside - _at(knots, here - m) for m in range(degree)]
            above = [_at(knots, here + m + 1) - inside for m in range(degree)]
            values, slopes = _triangle(
                inside, below, above, lambda j, r: above[r] + below[j - 1 - r]
            )
        tail = x - inside
        local = [value + slope * tail for value, slope in zip(values, slopes, strict=True)]
        return cell, _last(local), _last(slopes)

    def _cell(self, x: Tensor, grid: Tensor) -> Tensor:
        """Index of x's cell: the one right of a knot owns it, and the outer ones the tails."""
        inner = grid[:, 1:-1].contiguous()
        if len(inner) == 1:
            return torch.bucketize(x.contiguous(), inner[0], right=True)
        columns = x.reshape(-1, x.shape[-1]).T.contiguous()
        return torch.searchsorted(inner, columns, right=True).T.reshape(x.shape)


def _triangle(x, below, above, denominator):
    """Values and slopes of the degree + 1 B-splines over a cell, by growing the degree.

    Arguments:
        x: positions, for the shape and dtype of the constant 1 that it starts from.
        below, above: distances to the m-th knot at or below x, and above it, m from 0.
        denominator: (j, r) → distance between the knots that bound function r of degree
            j − 1, which is above[r] + below[j − 1 − r].
    """
    pieces = [torch.ones_like(x)]
    slopes = [torch.zeros_like(x)]
    for j in range(1, len(below) + 1):
        ratios = [pieces[r] / denominator(j, r) for r in range(j)]
        rising = [below[j - 1 - r] * ratios[r] for r in range(j)]
        falling = [above[r] * ratios[r] for r in range(j)]
        pieces = _neighbours(falling, rising)
        slopes = [j * s for s in _neighbours([-ratio for ratio in ratios], ratios)]
    return pieces, slopes


def _neighbours(own: list[Tensor], of_previous: list[Tensor]) -> list[Tensor]:
    """own_r + of_previous_{r−1}, for r one further than either has."""
    middle = [a + b for a, b in zip(own[1:], of_previous[:-1], strict=True)]
    return [own[0], *middle, of_previous[-1]]


def _at(rows: Tensor, index: Tensor) -> Tensor:
    """rows[channel, index] for index (…, in) and rows (channels or 1, K)."""
    if len(rows) == 1:
        return rows[0][index]
    channel = torch.arange(len(rows), device=rows.device)
    return rows[channel, index]


def _last(columns: list[Tensor]) -> Tensor:
    return torch.stack(columns, dim=-2).transpose(-1, -2)
