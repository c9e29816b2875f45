"""B-splines of any low degree, on equal cells or on free knots, in closed form."""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Self

import torch
from torch import Tensor

from ..initialization import assign_
from ..knots import equally_spaced, extended, insertion_matrix, split
from .base import Adaptable, Curved, Differentiable, functions_last, scatter_active, working_dtype
from .cpp_formulas import CppFormulas


class BSpline(Adaptable, Curved, Differentiable):
    """B-splines of degree 0 to 5.

    A B-spline is local: at x only the degree + 1 functions over x's grid cell differ from
    zero, and a triangle of degree (degree + 1) / 2 weighted means gives them all (de Boor,
    A Practical Guide to Splines, 2001, ch. X, algorithm BSPLVB). They sum to one, so the
    span holds constants, and a layer over it needs no bias.

    Outside the grid every function goes on linearly, with its value and slope at the
    grid's end: a raw B-spline would be 0 there, with no gradient to come back by. Degree 0
    is piecewise constant, and has no slope anywhere.

    In bfloat16 a value inside the range is the exact one rounded, within 2⁻⁸ |value| + 10⁻⁵
    where cells are at least a hundredth of the range's larger end: float32 cannot place an
    input in narrower ones that precisely. The knots keep float32's precision when the module
    is cast to less, for bfloat16 would move them by up to a hundredth of the range.

    Args:
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
        if not -math.inf < low < high < math.inf:
            raise ValueError(f"grid_range = {list(grid_range)}: expected finite low < high")
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
        shape = (self.channels or 1, grid_size + 2 * degree + 1)
        dtype = working_dtype(torch.get_default_dtype())
        self.register_buffer("knots", torch.empty(shape, dtype=dtype))
        if not (self._starting_knots().to(dtype).diff() > 0).all():
            raise ValueError(
                f"grid_range = {list(grid_range)}: its {grid_size} cells vanish in {dtype}"
            )
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
        return self._grid(self.knots)

    @property
    def exact_knots(self) -> Tensor:
        """All knots as functions are evaluated on, shaped as `knots`, in float64.

        Where cells are equal `knots` holds their rounding, from which only the ends are taken.
        """
        if not self.equal_cells:
            return self.knots.double()
        return equally_spaced(self.ends.double(), self.grid_size, self.degree)

    @property
    def ends(self) -> Tensor:
        return self._inner(self.knots)[:, :: self.grid_size]

    def reset_parameters(self) -> None:
        assign_(self.knots, self._starting_knots())

    def active(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, values, _ = self._local(x, self.knots)
        return first, values

    def derivatives(self, x: Tensor) -> Tensor:
        first, _, slopes = self._local(x, self.knots)
        return scatter_active(first, slopes, self.num_functions)

    def cpp_formulas(self) -> CppFormulas | None:
        if len(self.knots) > 1 or self.knots.dtype != torch.float32:
            return None
        knots = self.knots
        if self.equal_cells:
            knots = equally_spaced(self.ends, self.grid_size, self.degree)
        numbers = (float(self.degree), float(self.equal_cells))
        return CppFormulas("bspline", self.num_functions, numbers, knots[0].contiguous())

    def starting_values(self, x: Tensor) -> Tensor:
        first, values, _ = self._local(x.unsqueeze(-1), self._starting_knots())
        return scatter_active(first, values, self.num_functions).squeeze(-2)

    def with_grid(self, grid: Tensor) -> Self:
        """B-splines of this degree on another grid, of this one's dtype and device.

        A layer made over them starts at the scale that suits `grid_range`, and resetting them
        goes back to it: to have a layer start on a range, state that as `grid_range`.

        Args:
            grid: (channels or 1, cells + 1), increasing. More than one row gives every
                channel its own.

        Raises:
            ValueError: a row does not increase, or the cells have to be equal and are not, to
                1e-5 of a cell and the rounding of this basis' knots.
        """
        grid = grid.double()
        if not (grid.to(self.knots).diff() > 0).all():
            raise ValueError("grid: expected knots that increase in the basis' precision")
        if not self.equal_cells:
            return self._with_knots(extended(grid, self.degree).to(self.knots))
        equal = equally_spaced(grid[:, [0, -1]], grid.shape[1] - 1, self.degree)
        inner = equal[:, self.degree : equal.shape[1] - self.degree]
        rounding = torch.finfo(self.knots.dtype).eps * grid.abs().max().item()
        tolerance = 1e-5 * inner.diff().min().item() + rounding
        if not torch.allclose(inner, grid, rtol=0, atol=tolerance):
            raise ValueError(
                "grid: expected equally wide cells, because equal_cells is set; "
                "equal_cells=False lets each knot move"
            )
        return self._with_knots(equal.to(self.knots))

    def refined(self, grid_size: int) -> tuple[Self, Tensor]:
        """See `Refinable.refined`; the matrix is in float64, has no negative entry, and its
        rows sum to one (`kanlm.kan.knots.insertion_matrix`).

        In float32 equal cells are placed to 10⁻⁷ of the range's larger end, and values change
        by about as much of the coefficients as that is of a cell: by 10⁻⁶ on (-3, 3) in 60.
        """
        parts, rest = divmod(grid_size, self.grid_size)
        if rest or parts < 1:
            raise ValueError(
                f"grid_size = {grid_size}: expected a multiple of {self.grid_size}, so that "
                "every cell is split alike"
            )
        coarse = self.exact_knots
        # Of the knots in the outer cells, the `degree` nearest to the grid.
        start = self.degree * parts - self.degree
        fine = split(coarse, parts)[:, start : start + grid_size + 2 * self.degree + 1]
        knots = fine.to(self.knots)
        # Equal cells are made of their ends again; other knots are what rounding leaves of them.
        matrix = insertion_matrix(coarse, fine if self.equal_cells else knots.double(), self.degree)
        return self._with_knots(knots), matrix

    @torch.no_grad()
    def curvature_matrix(self) -> Tensor:
        """Q with cᵀ Q c = ∫ s″(x)² dx over the grid, for the spline s = Σ_b c_b φ_b.

        Differentiating a spline of degree k leaves one of degree k − 1 with coefficients
        k (c_b − c_{b−1}) / (t_{b+k} − t_b) on the knots without the outermost two (de Boor 2001,
        ch. X). Twice that is s″, of degree k − 2. The Gauss-Legendre rule of k − 1 points
        is exact for the product of two of those on each cell.

        Returns: (channels or 1, B, B) in float64.

        Raises:
            ValueError: the degree is less than 2.
        """
        degree, cells = self.degree, self.grid_size
        if degree < 2:
            raise ValueError(
                f"curvature of {self.label}: degree = {degree} has no second derivative; "
                "expected degree 2 or more, or smoothness in place of curvature"
            )
        knots = self.exact_knots
        second = _differentiation(knots[:, 1:-1], degree - 1) @ _differentiation(knots, degree)
        # s″ is evaluated by the basis of its own degree and knots.
        lower = BSpline(
            len(knots), grid_size=cells, degree=degree - 2, equal_cells=False, per_channel=True
        ).to(knots)
        lower.knots = knots[:, 2:-2]

        nodes, weights = (t.to(knots) for t in _gauss_legendre(degree - 1))
        ends = lower.grid.T
        halves = ends.diff(dim=0).unsqueeze(1) / 2
        middles = (ends[1:] + ends[:-1]).unsqueeze(1) / 2
        # (cells, points, channels), and the values at them, (cells, points, channels, B − 2).
        values = lower.values(middles + halves * nodes.unsqueeze(-1))
        gram = torch.einsum("gnca,gncb,gnc->cab", values, values, halves * weights.unsqueeze(-1))
        return second.mT @ gram @ second

    def _with_knots(self, knots: Tensor) -> Self:
        """A basis with these knots and this one's options."""
        many = len(knots) > 1
        basis = type(self)(
            len(knots) if many else None,
            grid_size=knots.shape[1] - 2 * self.degree - 1,
            degree=self.degree,
            grid_range=self.grid_range,
            equal_cells=self.equal_cells,
            per_channel=many,
        )
        basis.knots = knots.contiguous()
        return basis

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # What `to`, `half`, `cuda` and the like call.
        exact = self.knots
        super()._apply(fn, recurse)
        dtype = working_dtype(self.knots.dtype)
        if self.knots.dtype != dtype:
            self.knots = exact.to(self.knots.device, dtype)
        return self

    def _starting_knots(self) -> Tensor:
        """Equal cells, (1, G + 2 degree + 1), in float64 on the CPU."""
        ends = torch.tensor([self.grid_range], dtype=torch.float64, device="cpu")
        return equally_spaced(ends, self.grid_size, self.degree)

    def _inner(self, knots: Tensor) -> Tensor:
        return knots[:, self.degree : self.degree + self.grid_size + 1]

    def _grid(self, knots: Tensor) -> Tensor:
        """The inner knots. Equal cells are made of their ends: as precisely as its dtype can."""
        inner = self._inner(knots)
        if not self.equal_cells:
            return inner
        return equally_spaced(inner[:, :: self.grid_size], self.grid_size, 0)

    def _local(self, x: Tensor, knots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """First active function (…, in), values and slopes of the active, (…, in, support)."""
        given, x = x, x.to(working_dtype(x.dtype))
        degree, knots = self.degree, knots.to(x.dtype)
        grid = self._grid(knots)
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
        return cell, functions_last(local, given), functions_last(slopes, given)

    def _cell(self, x: Tensor, grid: Tensor) -> Tensor:
        """Index of x's cell: the one right of a knot owns it, and the outer ones the tails."""
        inner = grid[:, 1:-1].contiguous()
        if len(inner) == 1:
            return torch.bucketize(x.contiguous(), inner[0], right=True)
        columns = x.reshape(-1, x.shape[-1]).T.contiguous()
        return torch.searchsorted(inner, columns, right=True).T.reshape(x.shape)


def _triangle(x, below, above, denominator):
    """Values and slopes of the degree + 1 B-splines over a cell, by growing the degree.

    Args:
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


def _differentiation(knots: Tensor, degree: int) -> Tensor:
    """The matrix from a spline's coefficients to its derivative's, (channels, B − 1, B)."""
    spans = knots[:, degree + 1 : -1] - knots[:, 1 : -degree - 1]
    differences = torch.eye(spans.shape[1] + 1, dtype=knots.dtype, device=knots.device).diff(dim=0)
    return degree / spans.unsqueeze(-1) * differences


@lru_cache
def _gauss_legendre(points: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights on [−1, 1], exact for degree 2 points − 1.

    The nodes are the eigenvalues of the Legendre polynomials' Jacobi matrix, the weights
    twice the squares of its eigenvectors' first entries (Golub & Welsch 1969).
    """
    off = [n / math.sqrt(4 * n * n - 1) for n in range(1, points)]
    beside = torch.tensor(off, dtype=torch.float64, device="cpu").diag(1)
    jacobi = beside + beside.T if off else beside.new_zeros(1, 1)
    nodes, vectors = torch.linalg.eigh(jacobi)
    return nodes, 2 * vectors[0].square()


def _at(rows: Tensor, index: Tensor) -> Tensor:
    """rows[channel, index] for index (…, in) and rows (channels or 1, K)."""
    if len(rows) == 1:
        return rows[0][index]
    channel = torch.arange(len(rows), device=rows.device)
    return rows[channel, index]
