"""Sums over edges for code that torch.compile traces, keeping nothing for backward but arguments.

On a CPU cpu_gemm.cpp adds up in float32, in operators that Inductor does not look into. Of other
bases, dtypes and devices Inductor makes one kernel, the norm before it included.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..base_functions import BASE_FUNCTIONS, BaseFunction
from ..bases import Basis, Differentiable
from ..bases.cpp_formulas import CppFormulas
from ..tracing import constant_when_traced
from . import cpu_gemm


def contract_compiled(
    x: Tensor,
    coefficients: Tensor,
    basis: Basis,
    base: BaseFunction | None = None,
    base_weight: Tensor | None = None,
    *,
    by_cpp: bool = True,
) -> Tensor:
    """Sums over edges; arguments and result as of `contract_recomputing`, for any basis.

    Expansion and reordered coefficients are checkpointed: left to itself, the partitioner
    keeps both. The product is not, or backward would compute it again.
    """
    formulas = basis.cpp_formulas() if by_cpp and isinstance(basis, Differentiable) else None
    if formulas is not None and _left_to_native(formulas.source, x, coefficients, base_weight):
        flat = x.reshape(-1, x.shape[-1])
        source, functions, numbers, knots, _ = formulas
        y = _native_sums(
            flat, coefficients, base_weight, base, source, functions, list(numbers), knots
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


def _left_to_native(source: str, *tensors: Tensor | None) -> bool:
    given = (t for t in tensors if t is not None)
    floats = all(t.device.type == "cpu" and t.dtype == torch.float32 for t in given)
    return floats and not torch.is_autocast_enabled("cpu") and _compiles(source)


@constant_when_traced
def _compiles(source: str) -> bool:
    return cpu_gemm.compiles(CppFormulas(source, 0, ()))


def _eager_sums(
    x: Tensor,
    coefficients: Tensor,
    base_weight: Tensor | None,
    base: str | None,
    source: str,
    num_functions: int,
    numbers: list[float],
    knots: Tensor | None,
) -> Tensor:
    formulas = CppFormulas(source, num_functions, tuple(numbers), knots)
    return cpu_gemm.sums(formulas, x, coefficients, base_weight, cast(Any, base))


def _eager_gradients(
    dy: Tensor,
    x: Tensor,
    coefficients: Tensor,
    base_weight: Tensor | None,
    base: str | None,
    source: str,
    num_functions: int,
    numbers: list[float],
    knots: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    formulas = CppFormulas(source, num_functions, tuple(numbers), knots)
    found = cpu_gemm.gradients(
        formulas, dy, x, coefficients, base_weight, cast(Any, base), (True, True)
    )
    # An operator returns tensors.
    dx, dcoefficients, dbase = (x.new_empty(0) if each is None else each for each in found)
    return dx, dcoefficients, dbase


# Named after this module, because a copy of it may travel with an exported model.
_NAMESPACE = __name__.replace(".", "_")
_native_sums = torch.library.custom_op(f"{_NAMESPACE}::sums", _eager_sums, mutates_args=())
_native_gradients = torch.library.custom_op(
    f"{_NAMESPACE}::gradients", _eager_gradients, mutates_args=()
)


@_native_sums.register_fake
def _(x: Tensor, coefficients: Tensor, *others: Any) -> Tensor:
    return x.new_empty(x.shape[0], coefficients.shape[-1])


@_native_gradients.register_fake
def _(
    dy: Tensor, x: Tensor, coefficients: Tensor, base_weight: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    def like(weight: Tensor | None) -> Tensor:
        if weight is None:
            return x.new_empty(0)
        return torch.empty_like(weight, memory_format=torch.contiguous_format)

    return like(x), like(coefficients), like(base_weight)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, coefficients, base_weight, *ctx.options, knots = inputs
    ctx.save_for_backward(x, coefficients, base_weight, knots)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, knots = ctx.saved_tensors
    dx, dcoefficients, dbase = _native_gradients(dy, *tensors, *ctx.options, knots)
    return dx, dcoefficients, dbase if dbase.numel() else None, *[None] * 5


_native_sums.register_autograd(_backward, setup_context=_save)
