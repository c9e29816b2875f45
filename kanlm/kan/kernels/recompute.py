"""Sums over edges that keep nothing for backward but their arguments.

A basis expands every input to B numbers. Kept for backward, as autograd would, they are
most of a layer's memory; evaluating them again costs a few passes over the input, beside
products of 2 B · out operations an input.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..bases import Basis, Differentiable

#: Tokens that are expanded at a time. On a CPU a block and its gradient then stay in the
#: outer cache, and the products are still as fast as large ones; on a GPU it bounds memory.
_CPU_BLOCK = 2048
_GPU_BLOCK = 2**14


def contract_recomputing(x: Tensor, coefficients: Tensor, basis: Differentiable) -> Tensor:
    """`basis.contract` for eager torch. Gradients can be differentiated again, and torch.func's
    transforms apply, both with the whole expansion in memory.

    Arguments:
        x: (…, in).
        coefficients: (in, B, out).
        basis: without parameters: it gets no gradient.

    Returns: (…, out), in the dtype of autocast if that is on.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    flat = x.reshape(-1, x.shape[-1])
    with torch.autocast(device, enabled=False):
        y = _Contract.apply(flat, coefficients, basis, dtype)
    return y.reshape(*x.shape[:-1], coefficients.shape[-1])


def contract_compiled(x: Tensor, coefficients: Tensor, basis: Basis) -> Tensor:
    """`basis.contract` for code that torch.compile traces.

    Expansion and reordered coefficients are checkpointed: left to itself, the partitioner
    keeps both. The product is not, or backward would compute it again.
    """
    expanded = _recomputed(lambda x: _functions_first(basis.values(x)), x)
    return expanded @ _recomputed(lambda c: c.transpose(0, 1).flatten(0, 1), coefficients)


def _recomputed(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    y = checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(y, Tensor)
    return y


class _SiLU(Differentiable):
    """x σ(x) as a basis of one function, so that a base is recomputed, too."""

    num_functions = 1
    label = "silu"  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]

    def values(self, x: Tensor) -> Tensor:
        return F.silu(x).unsqueeze(-1)

    def derivatives(self, x: Tensor) -> Tensor:
        s = torch.sigmoid(x)
        return (s * (1 + x * (1 - s))).unsqueeze(-1)

    def starting_values(self, x: Tensor) -> Tensor:
        return self.values(x)

    def reset_parameters(self) -> None: ...


#: The base function `silu`, to be contracted with its weights as (in, 1, out).
SILU = _SiLU()


class _Contract(torch.autograd.Function):
    """Sums over edges of x (N, in), computed block by block.

    Arguments: as of `contract_recomputing`; `dtype` is that of the products.
    """

    @staticmethod
    def forward(
        x: Tensor, coefficients: Tensor, basis: Differentiable, dtype: torch.dtype
    ) -> Tensor:
        matrix = _matrix(coefficients, dtype)
        y = x.new_empty(x.shape[0], coefficients.shape[-1], dtype=dtype)
        for rows in _blocks(x):
            torch.mm(_functions_first(basis.evaluate(x[rows])).to(dtype), matrix, out=y[rows])
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, coefficients, ctx.basis, ctx.dtype = inputs
        ctx.save_for_backward(x, coefficients)
        ctx.save_for_forward(x, coefficients)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients
        x, coefficients = ctx.saved_tensors
        if torch.is_grad_enabled():  # for `create_graph`
            return *_differentiable_gradients(x, coefficients, dy, ctx.basis), None, None
        need_dx, need_dc = ctx.needs_input_grad[:2]
        matrix = _matrix(coefficients, ctx.dtype)
        # Blocks are added up in float32 at least.
        wide = torch.promote_types(ctx.dtype, torch.float32)
        dmatrix = torch.zeros_like(matrix, dtype=wide) if need_dc else None
        dx = torch.empty_like(x) if need_dx else None
        for rows in _blocks(x):
            block, dy_block = x[rows], dy[rows]
            if dmatrix is not None:
                expanded = _functions_first(ctx.basis.evaluate(block)).to(ctx.dtype)
                if ctx.dtype == wide:
                    dmatrix.addmm_(expanded.T, dy_block)
                else:
                    dmatrix += expanded.T @ dy_block
            if dx is not None:
                by_function = (dy_block @ matrix.T).unflatten(-1, (-1, x.shape[-1]))
                dx[rows] = ctx.basis.pull_back(block, by_function)
        if dmatrix is None:
            return dx, None, None, None
        by_function = dmatrix.to(coefficients.dtype).unflatten(0, (-1, x.shape[-1]))
        return dx, by_function.transpose(0, 1), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        dx, dcoefficients = tangents[:2]
        x, coefficients = ctx.saved_tensors
        dy = torch.zeros((), device=x.device, dtype=ctx.dtype)
        if dx is not None:
            moved = _functions_first(ctx.basis.derivatives(x) * dx.unsqueeze(-1))
            dy = dy + moved.to(ctx.dtype) @ _matrix(coefficients, ctx.dtype)
        if dcoefficients is not None:
            expanded = _functions_first(ctx.basis.values(x)).to(ctx.dtype)
            dy = dy + expanded @ _matrix(dcoefficients, ctx.dtype)
        return dy

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        x, coefficients, basis, dtype = args

        def sums(x: Tensor, coefficients: Tensor) -> Tensor:
            return _functions_first(basis.values(x)).to(dtype) @ _matrix(coefficients, dtype)

        return torch.vmap(sums, in_dims[:2])(x, coefficients), 0


def _differentiable_gradients(
    x: Tensor, coefficients: Tensor, dy: Tensor, basis: Differentiable
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the coefficients, by operations that autograd knows."""
    products = torch.einsum("no,ibo->nib", dy.to(coefficients.dtype), coefficients)
    dx = (products.to(x.dtype) * basis.derivatives(x)).sum(dim=-1)
    values = basis.values(x).to(coefficients.dtype)
    return dx, torch.einsum("nib,no->ibo", values, dy.to(coefficients.dtype))


def _functions_first(values: Tensor) -> Tensor:
    """(…, in, B) → (…, B · in), as bases lay it out."""
    return values.transpose(-1, -2).flatten(-2)


def _matrix(coefficients: Tensor, dtype: torch.dtype) -> Tensor:
    """(in, B, out) → (B · in, out)."""
    return coefficients.transpose(0, 1).flatten(0, 1).to(dtype)


def _blocks(x: Tensor) -> list[slice]:
    size = _CPU_BLOCK if x.device.type == "cpu" else _GPU_BLOCK
    return [slice(start, start + size) for start in range(0, x.shape[0], size)]
