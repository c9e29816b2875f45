"""Sums over edges that keep nothing for backward but their arguments.

A basis expands every input to B numbers. Kept for backward, as autograd would, they are
most of a layer's memory; evaluating them again costs a few passes over the input, beside
products of 2 B · out operations an input. Where cpu_gemm.cpp can, it evaluates them inside the
products; elsewhere a block of tokens is expanded at a time, for torch's.
"""

from typing import Any

import torch
from torch import Tensor

from ..base_functions import BASE_FUNCTIONS, BASE_GRADIENTS, BASE_SLOPES, BaseFunction
from ..bases import Differentiable
from ..casts import kept
from . import cpu_gemm

#: Tokens that are expanded at a time. On a CPU a block and its gradient then stay in the
#: outer cache, and the products are still as fast as large ones; on a GPU it bounds memory.
_CPU_BLOCK = 2048
_GPU_BLOCK = 2**14


def contract_recomputing(
    x: Tensor,
    coefficients: Tensor,
    basis: Differentiable,
    base: BaseFunction | None = None,
    base_weight: Tensor | None = None,
    *,
    by_cpp: bool = True,
) -> Tensor:
    """Sums over edges for eager torch. Gradients can be differentiated again, and torch.func's
    transforms apply, both with the whole expansion in memory.

    The base is one more function, so that one product adds up all.

    Args:
        x: (…, in).
        coefficients: (in, B, out).
        basis: without parameters: it gets no gradient.
        base: function beside the basis, with `base_weight` (out, in).
        by_cpp: use cpu_gemm.cpp where it can.

    Returns: (…, out), in the dtype of autocast if that is on.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    flat = x.reshape(-1, x.shape[-1])
    with torch.autocast(device, enabled=False):
        y = _Contract.apply(flat, coefficients, base_weight, basis, base, dtype, by_cpp)
    return y.reshape(*x.shape[:-1], coefficients.shape[-1])


class _Contract(torch.autograd.Function):
    """Sums over edges of x (N, in), computed block by block.

    Args: as of `contract_recomputing`; `dtype` is that of the products.
    """

    @staticmethod
    def forward(
        x: Tensor,
        coefficients: Tensor,
        base_weight: Tensor | None,
        basis: Differentiable,
        base: BaseFunction | None,
        dtype: torch.dtype,
        by_cpp: bool,
    ) -> Tensor:
        return sums(x, coefficients, base_weight, basis, base, dtype, by_cpp)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.basis, ctx.base, ctx.dtype, ctx.by_cpp = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients
        x, coefficients, base_weight = ctx.saved_tensors
        if torch.is_grad_enabled():  # for `create_graph`
            found = _differentiable_gradients(x, coefficients, base_weight, dy, ctx.basis, ctx.base)
            return *found, None, None, None, None
        need_dx, *need_weights = ctx.needs_input_grad[:3]
        needs = need_dx, any(need_weights)
        found = gradients_of_sums(
            *(dy, x, coefficients, base_weight, ctx.basis, ctx.base, ctx.dtype, needs, ctx.by_cpp)
        )
        return *found, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        dx, dcoefficients, dbase = tangents[:3]
        x, coefficients, base_weight = ctx.saved_tensors
        dy = torch.zeros((), device=x.device, dtype=ctx.dtype)
        if dx is not None:
            moved = _slopes(x, ctx.basis, ctx.base) * dx.unsqueeze(-2)
            matrix = _matrix(coefficients, base_weight, ctx.dtype)
            dy = dy + moved.flatten(-2).to(ctx.dtype) @ matrix
        if dcoefficients is not None or dbase is not None:
            moved = torch.zeros_like(coefficients) if dcoefficients is None else dcoefficients
            if base_weight is not None and dbase is None:
                dbase = torch.zeros_like(base_weight)
            expanded = _values(x, ctx.basis, ctx.base).flatten(-2).to(ctx.dtype)
            dy = dy + expanded @ _matrix(moved, dbase, ctx.dtype)
        return dy

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        *tensors, basis, base, dtype, _ = args

        def sums(x: Tensor, coefficients: Tensor, base_weight: Tensor | None = None) -> Tensor:
            expanded = _values(x, basis, base).flatten(-2).to(dtype)
            return expanded @ _matrix(coefficients, base_weight, dtype)

        given = [each for each in zip(tensors, in_dims, strict=False) if each[0] is not None]
        tensors, dims = zip(*given, strict=True)
        return torch.vmap(sums, dims)(*tensors), 0


def sums(
    x: Tensor,
    coefficients: Tensor,
    base_weight: Tensor | None,
    basis: Differentiable,
    base: BaseFunction | None,
    dtype: torch.dtype,
    by_cpp: bool = True,
) -> Tensor:
    """Sums over edges, by cpu_gemm.cpp or block by block: (N, in) → (N, out) in `dtype`."""
    formulas = basis.cpp_formulas()
    if by_cpp and dtype == x.dtype and cpu_gemm.can(formulas, x, coefficients, base_weight):
        return cpu_gemm.sums(formulas, x, coefficients, base_weight, base)
    matrix = _kept_matrix(coefficients, base_weight, dtype)
    y = x.new_empty(x.shape[0], coefficients.shape[-1], dtype=dtype)
    for rows in _blocks(x):
        torch.mm(_expanded(x[rows], basis, base).to(dtype), matrix, out=y[rows])
    return y


def gradients_of_sums(
    dy: Tensor,
    x: Tensor,
    coefficients: Tensor,
    base_weight: Tensor | None,
    basis: Differentiable,
    base: BaseFunction | None,
    dtype: torch.dtype,
    needs: tuple[bool, bool] = (True, True),
    by_cpp: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, coefficients and base weights, by cpu_gemm.cpp or block by block, of which
    nobody asks one.

    Args:
        needs: whether that of x is asked for, and whether those of the weights are.
    """
    formulas = basis.cpp_formulas()
    if by_cpp and dtype == x.dtype and cpu_gemm.can(formulas, x, coefficients, base_weight, dy):
        return cpu_gemm.gradients(formulas, dy, x, coefficients, base_weight, base, needs)
    need_dx, need_weights = needs
    matrix = _kept_matrix(coefficients, base_weight, dtype)
    # Blocks are added up in float32 at least.
    wide = torch.promote_types(dtype, torch.float32)
    dmatrix = torch.zeros_like(matrix, dtype=wide) if need_weights else None
    dx = torch.empty_like(x) if need_dx else None
    for rows in _blocks(x):
        block, dy_block = x[rows], dy[rows]
        if dmatrix is not None:
            expanded = _expanded(block, basis, base).to(dtype)
            if dtype == wide:
                dmatrix.addmm_(expanded.T, dy_block)
            else:
                dmatrix += expanded.T @ dy_block
        if dx is not None:
            by_function = (dy_block @ matrix.T).unflatten(-1, (-1, x.shape[-1]))
            dx[rows] = _pulled_back(block, by_function, basis, base)
    if dmatrix is None:
        return dx, None, None
    by_function = dmatrix.to(coefficients.dtype).unflatten(0, (-1, x.shape[-1]))
    dcoefficients = by_function[: coefficients.shape[1]].transpose(0, 1)
    return dx, dcoefficients, None if base_weight is None else by_function[-1].T


# Functions of basis and base, base last, functions before channels: (N, in) → (N, F, in)


def _expanded(x: Tensor, basis: Differentiable, base: BaseFunction | None) -> Tensor:
    """All values, flattened to (N, F · in), of which nobody asks a gradient."""
    functions = basis.num_functions
    values = x.new_empty(x.shape[0], functions + (base is not None), x.shape[1])
    basis.write_values(x, values[:, :functions])
    if base is not None:
        values[:, -1] = BASE_FUNCTIONS[base](x)
    return values.flatten(1)


def _pulled_back(
    x: Tensor, gradients: Tensor, basis: Differentiable, base: BaseFunction | None
) -> Tensor:
    """Sum of gradients (N, F, in) times slopes, of which nobody asks a gradient: (N, in)."""
    if base is None:
        return basis.pull_back(x, gradients)
    dx = basis.pull_back(x, gradients[:, :-1])
    return dx.add_(BASE_GRADIENTS[base](gradients[:, -1].to(dx.dtype), x))


def _values(x: Tensor, basis: Differentiable, base: BaseFunction | None) -> Tensor:
    values = basis.values(x).transpose(-1, -2)
    if base is None:
        return values
    return torch.cat([values, BASE_FUNCTIONS[base](x).unsqueeze(-2)], dim=-2)


def _slopes(x: Tensor, basis: Differentiable, base: BaseFunction | None) -> Tensor:
    slopes = basis.derivatives(x).transpose(-1, -2)
    if base is None:
        return slopes
    return torch.cat([slopes, BASE_SLOPES[base](x).unsqueeze(-2)], dim=-2)


def _differentiable_gradients(
    x: Tensor,
    coefficients: Tensor,
    base_weight: Tensor | None,
    dy: Tensor,
    basis: Differentiable,
    base: BaseFunction | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x, coefficients and base weights, by operations that autograd knows."""
    dy = dy.to(coefficients.dtype)
    matrix = _matrix(coefficients, base_weight, coefficients.dtype)
    products = (dy @ matrix.T).unflatten(-1, (-1, x.shape[-1])).to(x.dtype)
    dx = (products * _slopes(x, basis, base)).sum(dim=-2)
    values = _values(x, basis, base).to(coefficients.dtype)
    by_function = torch.einsum("nbi,no->ibo", values, dy)
    dbase = None if base_weight is None else by_function[:, -1].T
    return dx, by_function[:, : coefficients.shape[1]], dbase


def _matrix(coefficients: Tensor, base_weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(in, B, out) and (out, in) → (F · in, out)."""
    rows = coefficients.transpose(0, 1).flatten(0, 1)
    return (rows if base_weight is None else torch.cat([rows, base_weight.T])).to(dtype)


def _kept_matrix(coefficients: Tensor, base_weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The same, of which nobody asks a gradient."""
    weights = coefficients, base_weight
    return kept(lambda: _matrix(*weights, dtype), dtype, *weights)


def _blocks(x: Tensor) -> list[slice]:
    size = _CPU_BLOCK if x.device.type == "cpu" else _GPU_BLOCK
    return [slice(start, start + size) for start in range(0, x.shape[0], size)]
