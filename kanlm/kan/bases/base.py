"""What every basis is, and what some can do beside.

A basis turns x (…, in) into the values of its B functions, (…, in, B). Its state that must
survive saving (knots, centres, scales) is a persistent buffer or a parameter.

Capabilities are declared by base classes, and kernels, grids and penalties ask for them with
`isinstance`: `Differentiable` has its derivatives in closed form, `Local` has few functions
that differ from zero at any one input, `Refinable` can be put on a finer grid exactly,
`Adaptable` on a grid of other cells, and `Curved` knows the integral of its squared curvature.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import ClassVar, Literal, Self, get_args

import torch
from torch import Tensor, nn

from ..initialization import assign_
from ..moments import unit_normal_mean, unit_normal_projection
from ..plain_tensors import is_plain
from .cpp_formulas import CppFormulas
from .tanh import squashed

#: What a basis does with inputs outside its range.
#:
#: - `linear`: every function goes on with its value and slope at the end of the range;
#: - `squash`: inputs are bent into the range, x → c + R tanh((x − c) / R) with the centre c
#:   and the half-width R of the range;
#: - `periodic`: the range is one period.
Outside = Literal["linear", "squash", "periodic"]


class Basis(nn.Module, ABC):
    """B functions of one variable, evaluated on every input channel.

    Arguments of a subclass: `channels` first, the number of inputs or None, then its options
    as keyword-only arguments. A basis with parameters or a grid may keep one set an input;
    where `channels` is None all inputs share one.
    """

    #: B, the number of functions and so of coefficients an edge.
    num_functions: int
    #: Inputs with parameters or a grid of their own; None where all share one set.
    channels: int | None = None
    #: FLOPs of evaluating all functions at one input, estimated from the formulas: about one
    #: for every addition, multiplication, division, comparison and transcendental. What runs
    #: may take twice as many, which is little beside the 2 B of every output.
    flops_per_input: int
    #: Whether some combination of the functions is constant, so that a layer needs no bias.
    spans_constants: bool = False
    #: Whether the functions stand in a row along x, so that neighbours overlap.
    in_a_row: ClassVar[bool] = False
    #: The function that a layer lays beside this basis unless it is told: polynomials do
    #: better without one, local functions with (the tables of configs/ablation-*.yaml).
    default_base: ClassVar[Literal["silu"] | None] = "silu"

    @property
    @abstractmethod
    def label(self) -> str:
        """Name of kind and size in reports, such as `bspline1-g6`."""

    @property
    def ends(self) -> Tensor:
        """Lower and upper end of the range, (channels or 1, 2); the whole line by default."""
        return torch.tensor([[-math.inf, math.inf]])

    @abstractmethod
    def values(self, x: Tensor) -> Tensor:
        """Evaluate all functions: (…, in) → (…, in, B), in the dtype of x, or in float32
        where x holds integers.

        Our bases compute in float32 where x has less, and round once, at the end.

        The result is best laid out with `in` innermost, as a transposed view of
        (…, B, in), because `contract` then needs no copy.
        """

    @abstractmethod
    def starting_values(self, x: Tensor) -> Tensor:
        """`values` of a freshly reset basis: (n,) → (n, B), for x on the CPU in float64.

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

    @cached_property
    def identity_coefficients(self) -> list[float]:
        """The B coefficients whose combination is nearest to x for x ~ N(0, 1) at the start."""
        return unit_normal_projection(self.starting_values, lambda z: z)

    def contract(self, x: Tensor, coefficients: Tensor) -> Tensor:
        """Sum every edge's function: y_o = Σ_i Σ_b φ_b(x_i) c_ibo.

        One matrix product over the flattened (in, B): the reference that the backends of
        `kanlm.kan.kernels` agree with.

        Args:
            x: (…, in).
            coefficients: (in, B, out).

        Returns: (…, out).
        """
        functions_first = self.values(x).transpose(-1, -2).flatten(-2)
        return functions_first @ coefficients.transpose(0, 1).flatten(0, 1)


class Differentiable(Basis):
    """A basis whose derivatives are about as cheap as its values."""

    def cpp_formulas(self) -> CppFormulas | None:
        """The same functions in C++, if one of the files of this folder has them."""
        return None

    def write_values(self, x: Tensor, to: Tensor) -> None:
        """Put the values of all functions into `to`, of which nobody asks a gradient: a basis
        may take shortcuts.

        Shapes: (N, in) and (N, B, in), of which each row is contiguous.
        """
        formulas = self.cpp_formulas()
        if formulas is not None and formulas.can(x):
            formulas.write_values(x, to)
        else:
            self._write_values(x, to)

    def _write_values(self, x: Tensor, to: Tensor) -> None:
        """`write_values` by torch's operators."""
        to.copy_(self.values(x).transpose(-1, -2))

    def pull_back(self, x: Tensor, gradients: Tensor) -> Tensor:
        """Σ_b g_b dφ_b/dx, of which nobody asks a gradient.

        Shapes: (N, in) and (N, B, in), of which each row is contiguous, → (N, in).
        """
        formulas = self.cpp_formulas()
        if formulas is not None and formulas.can(x):
            return formulas.pull_back(x, gradients)
        total: Tensor | None = None
        for gradient, slope in zip(
            gradients.unbind(-2), self.derivatives(x).unbind(-1), strict=True
        ):
            gradient = gradient.to(slope.dtype)
            total = gradient * slope if total is None else total.addcmul_(gradient, slope)
        assert total is not None
        return total

    @abstractmethod
    def derivatives(self, x: Tensor) -> Tensor:
        """dφ_b/dx: (…, in) → (…, in, B). At a kink the derivative is that from the right."""


class Local(Basis):
    """A basis of which only `support` neighbouring functions differ from zero anywhere."""

    #: Functions that can differ from zero at one input.
    support: int
    in_a_row = True

    @abstractmethod
    def active(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The functions that differ from zero.

        Returns: the index of the first, (…, in), int64, and the values of that and its
        successors, (…, in, support), laid out as those of `values`.
        """

    def values(self, x: Tensor) -> Tensor:
        first, local = self.active(x)
        return scatter_active(first, local, self.num_functions)


class Refinable(Local):
    """A basis on a grid of cells that a finer grid can hold without changing any function.

    Its constructor takes `grid_size`, by which a model's settings say how fine it is.
    """

    grid_size: int

    @abstractmethod
    def refined(self, grid_size: int) -> tuple[Self, Tensor]:
        """The basis on a grid that splits every cell into equally many.

        Returns: the finer basis, with this one's range, and the matrix
        (channels or 1, finer B, B) that turns coefficients of this basis into those of the
        same function in the finer one.

        Raises:
            ValueError: `grid_size` is no multiple of this one's.
        """


class Adaptable(Refinable):
    """A basis whose cells can be moved to where inputs are."""

    @property
    @abstractmethod
    def grid(self) -> Tensor:
        """The cells' ends, (channels or 1, grid_size + 1), increasing."""

    @abstractmethod
    def with_grid(self, grid: Tensor) -> Self:
        """The basis on another grid, with this one's options, dtype and device.

        Raises:
            ValueError: a row does not increase, or its cells are not those that the options ask
                for.
        """


class Curved(Basis):
    """A basis of piecewise polynomials, whose second derivatives are integrated exactly."""

    @abstractmethod
    def curvature_matrix(self) -> Tensor:
        """Q with cᵀ Q c = ∫ s″(x)² dx for s = Σ_b c_b φ_b, (channels or 1, B, B) in float64.

        Raises:
            ValueError: the functions have no second derivative.
        """


class Smooth(Differentiable):
    """A basis of formulas that hold on a range, with a stated behaviour outside it.

    Subclasses give the formulas and their derivatives; this class extends them beyond the
    range, and owns their parameters if they have any.

    Args:
        num_functions: B.
        half_width: R; the range is (−R, R). Inputs are expected normalised.
        outside: behaviour beyond the range.
        channels: inputs with parameters of their own; None shares one set.

    Raises:
        ValueError: an option is out of its range.
    """

    #: The `outside` that labels leave unsaid. Not the default, which may change.
    unsaid_outside: ClassVar[Outside] = "linear"

    def __init__(
        self,
        num_functions: int,
        half_width: float,
        outside: Outside,
        channels: int | None = None,
    ) -> None:
        super().__init__()
        if num_functions < 1:
            raise ValueError(f"{type(self).__name__} would hold no function: raise its degree")
        if not 0 < half_width < math.inf:
            raise ValueError(f"half_width = {half_width}: expected a positive number")
        if outside not in get_args(Outside):
            raise ValueError(f"outside = {outside!r}: expected {', '.join(get_args(Outside))}")
        self.num_functions = num_functions
        self.half_width = float(half_width)
        self.outside: Outside = outside
        self.channels = channels
        for name, start in self.starting_parameters().items():
            shape = (len(start), channels or 1)
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.reset_parameters()

    @property
    @abstractmethod
    def size_label(self) -> str:
        """Name of kind and size, such as `hermite3`."""

    @property
    def label(self) -> str:
        """Kind, size and, unless it is the customary one, `outside`: `hermite3-squash`."""
        suffix = "" if self.outside == self.unsaid_outside else f"-{self.outside}"
        return self.size_label + suffix

    def starting_parameters(self) -> dict[str, Tensor]:
        """Name → start, (k, 1) in float64 on the CPU, of each parameter of shape (k, channels).

        Called from `__init__`, when the subclass has set its options.
        """
        return {}

    @abstractmethod
    def functions(self, x: Tensor, parameters: Mapping[str, Tensor]) -> list[Tensor]:
        """Values of the B functions for x (…, in) in the range, each (…, in).

        Args:
            parameters: by the names of `starting_parameters`, (k, channels or 1) each.
        """

    @abstractmethod
    def slopes(self, x: Tensor, parameters: Mapping[str, Tensor]) -> list[Tensor]:
        """Derivatives of the B functions, as `functions`."""

    @property
    def ends(self) -> Tensor:
        return torch.tensor([[-self.half_width, self.half_width]], dtype=torch.float64)

    def values(self, x: Tensor) -> Tensor:
        work = x.to(working_dtype(x.dtype))
        return functions_last(self._columns(work, self._own_parameters(work.dtype)), x)

    def _write_values(self, x: Tensor, to: Tensor) -> None:
        parameters = self._own_parameters(working_dtype(x.dtype))
        if self.outside != "linear" or parameters or x.device.type != "cpu" or not is_plain(x):
            super()._write_values(x, to)
            return
        # Only the few inputs outside get tails. On a GPU, asking which would have to wait.
        work = x.to(working_dtype(x.dtype))
        inside = work.clamp(-self.half_width, self.half_width)
        for row, column in zip(to.unbind(-2), self.functions(inside, parameters), strict=True):
            row.copy_(column.expand_as(row))
        places = (work != inside).nonzero(as_tuple=True)
        ends = inside[places]
        slopes = functions_last(self.slopes(ends, parameters), ends)
        tails = slopes * (work[places] - ends).unsqueeze(-1)
        values = functions_last(self.functions(ends, parameters), ends) + tails
        to.transpose(-1, -2)[places] = values.to(to)

    def derivatives(self, x: Tensor) -> Tensor:
        given, x = x, x.to(working_dtype(x.dtype))
        parameters = self._own_parameters(x.dtype)
        if self.outside == "periodic":
            columns = self.slopes(x, parameters)
        elif self.outside == "squash":
            bent = torch.tanh(x / self.half_width)
            bend = 1 - bent * bent
            columns = [bend * s for s in self.slopes(self.half_width * bent, parameters)]
        else:
            columns = self.slopes(x.clamp(-self.half_width, self.half_width), parameters)
        return functions_last(columns, given)

    def starting_values(self, x: Tensor) -> Tensor:
        columns = self._columns(x.unsqueeze(-1), self.starting_parameters())
        return functions_last(columns, x.unsqueeze(-1)).squeeze(-2)

    def reset_parameters(self) -> None:
        for name, start in self.starting_parameters().items():
            assign_(self.get_parameter(name), start)

    def extra_repr(self) -> str:
        return f"{self.label}, half_width={self.half_width:g}, outside={self.outside}"

    def _own_parameters(self, dtype: torch.dtype) -> dict[str, Tensor]:
        return {name: p.to(dtype) for name, p in self.named_parameters(recurse=False)}

    def _columns(self, x: Tensor, parameters: Mapping[str, Tensor]) -> list[Tensor]:
        """The B functions at x (…, in), also beyond the range."""
        limit = self.half_width
        if self.outside == "periodic":
            return self.functions(x, parameters)
        if self.outside == "squash":
            return self.functions(squashed(x, limit), parameters)
        inside = x.clamp(-limit, limit)
        tail, right = x - inside, x > 0
        low, high = (self.slopes(x.new_full((1,), end), parameters) for end in (-limit, limit))
        return [
            value + torch.where(right, b, a) * tail
            for value, a, b in zip(self.functions(inside, parameters), low, high, strict=True)
        ]


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which functions of x are computed: float32 for anything less.

    Cells, recurrences and angles lose their meaning in eight bits long before values do.
    """
    return torch.promote_types(dtype, torch.float32)


def functions_last(columns: list[Tensor], x: Tensor) -> Tensor:
    """Functions, each (…, in) or broadcasting to it, as (…, in, B) in the dtype of x.

    Integers have none to keep: their functions stay in the working dtype.
    """
    dtype = x.dtype if x.is_floating_point() else working_dtype(x.dtype)
    return torch.stack([c.to(dtype).expand_as(x) for c in columns], dim=-2).transpose(-1, -2)


def scatter_active(first: Tensor, local: Tensor, num_functions: int) -> Tensor:
    """Put the values of neighbouring functions, (…, in, support), into all B: (…, in, B)."""
    rows = local.transpose(-1, -2)
    offsets = torch.arange(rows.shape[-2], device=first.device).unsqueeze(-1)
    dense = rows.new_zeros(*first.shape[:-1], num_functions, first.shape[-1])
    return dense.scatter(-2, first.unsqueeze(-2) + offsets, rows).transpose(-1, -2)
