"""Sums over edges for code that torch.compile traces, keeping nothing for backward but arguments.

Inductor makes one kernel of a basis, the norm before it included. Of B-splines it makes several
with the cells of all inputs in memory between them, so on a CPU they are left to bspline.cpp, in
operators that it does not look into.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .. import native
from ..base_functions import BASE_FUNCTIONS, BaseFunction
from ..bases import Basis, BSpline
from ..bases.bspline_native import Spline
from ..tracing import constant_when_traced
from .recompute import gradients_of_sums, sums


def contract_compiled(
    x: Tensor,
    coefficients: Tensor,
    basis: Basis,
    base: BaseFunction | None = None,
    base_weight: Tensor | None = None,
) -> Tensor:
    """Sums over edges; arguments and result as of `contract_recomputing`, for any basis.

    Expansion and reordered coefficients are checkpointed: left to itself, the partitioner
    keeps both. The product is not, or backward would compute it again.
    """
    if isinstance(basis, BSpline) and _left_to_native(x, coefficients, basis):
        flat = x.reshape(-1, x.shape[-1])
        y = _spline_sums(
            flat, coefficients, base_weight, basis.knots, basis.degree, basis.equal_cells, base
        )
        return y.reshape(*x.shape[:-1], coefficients.shape[-1])

    def expand(x: Tensor) -> Tensor:
        return basis.values(x).transpose(-1, -2).flatten(-2)

    def reorder(coefficients: Tensor) -> Tensor:
        return coefficients.transpose(0, 1).flatten(0, 1)

    y = _recomputed(expand, x) @ _recomputed(reorder, coefficients)
    if base is None:
        return y
    assert base_weight is not None
    return y + F.linear(_recomputed(BASE_FUNCTIONS[base], x), base_weight)


def _recomputed(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    y = checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(y, Tensor)
    return y


def _left_to_native(x: Tensor, coefficients: Tensor, basis: BSpline) -> bool:
    tensors = (x, coefficients, basis.knots)
    floats = all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)
    one_grid = len(basis.knots) == 1 and not torch.is_autocast_enabled("cpu")
    return floats and one_grid and _native_compiles()


@constant_when_traced
def _native_compiles() -> bool:
    return native.obstacle() is None


def _eager_sums(
    x: Tensor,
    coefficients: Tensor,
    base_weight: Tensor | None,
    knots: Tensor,
    degree: int,
    equal_cells: bool,
    base: str | None,
) -> Tensor:
    spline = Spline.on(knots, degree, equal_cells)
    return sums(x, coefficients, base_weight, spline, cast(Any, base), x.dtype)


def _eager_gradients(
    dy: Tensor,
    x: Tensor,
    coefficients: Tensor,
    base_weight: Tensor | None,
    knots: Tensor,
    degree: int,
    equal_cells: bool,
    base: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    spline = Spline.on(knots, degree, equal_cells)
    dx, dcoefficients, dbase = gradients_of_sums(
        dy, x, coefficients, base_weight, spline, cast(Any, base), x.dtype
    )
    assert dx is not None
    assert dcoefficients is not None
    # An operator returns tensors, laid out as its fake says.
    dbase = x.new_empty(0) if dbase is None else dbase.contiguous()
    return dx, dcoefficients.contiguous(), dbase


# Named after this module, because a copy of it may travel with an exported model.
_NAMESPACE = __name__.replace(".", "_")
_spline_sums = torch.library.custom_op(f"{_NAMESPACE}::sums", _eager_sums, mutates_args=())
_spline_gradients = torch.library.custom_op(
    f"{_NAMESPACE}::gradients", _eager_gradients, mutates_args=()
)


@_spline_sums.register_fake
def _(x: Tensor, coefficients: Tensor, *others: Any) -> Tensor:
    return x.new_empty(x.shape[0], coefficients.shape[-1])


@_spline_gradients.register_fake
def _(
    dy: Tensor, x: Tensor, coefficients: Tensor, base_weight: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    contiguous = torch.contiguous_format
    dbase = (
        x.new_empty(0)
        if base_weight is None
        else torch.empty_like(base_weight, memory_format=contiguous)
    )
    return (
        torch.empty_like(x, memory_format=contiguous),
        torch.empty_like(coefficients, memory_format=contiguous),
        dbase,
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.degree, ctx.equal_cells, ctx.base = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    found = _spline_gradients(dy, *ctx.saved_tensors, ctx.degree, ctx.equal_cells, ctx.base)
    dx, dcoefficients, dbase = found
    return dx, dcoefficients, None if ctx.base is None else dbase, None, None, None, None


_spline_sums.register_autograd(_backward, setup_context=_save)
