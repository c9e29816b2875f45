"""Sums of piecewise linear functions on a CPU, at about the cost of the matrix product.

A function that is linear between knots t_0 < … < t_G is the sum of its values at the
knots times hat functions, and a hat is a difference of two ramps, each one clamp:

    f(x) = Σ_b f(t_b) (u_{b−1}(x) − u_b(x)),   u_k(x) = (clamp(x, t_k, t_{k+1}) − t_k) / h_k

where u_{−1} = 1, u_G = 0, and the outer cells reach to infinity. A layer of such functions
is a sum over knots of hat @ values. Knot by knot, the expansion stays in cache and is never
stored: backward makes the hats again. Summing ramps times slopes would be a pass cheaper,
but the gradient at a knot that no input is near would then be a rounding error in place of
zero, which AdamW blows up to a full step.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def contract_piecewise_linear(x: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    """y_o = Σ_i f_io(x_i) for the functions with f_io(knots_k) = values_iko.

    At a knot the derivative is that from the right. Gradients can be differentiated again, and
    torch.func's reverse-mode transforms apply, with all hats in memory then.

    Arguments:
        x: (…, in), float32 or float64 on the CPU.
        knots: (G + 1,), increasing.
        values: (in, G + 1, out).

    Returns: (…, out).
    """
    flat = x.reshape(-1, x.shape[-1])
    # Compiled code calls an operator that it does not look into.
    contract = _compiled_sums if torch.compiler.is_compiling() else _Contract.apply
    y = contract(flat, knots.to(x.dtype), values)
    return y.reshape(*x.shape[:-1], values.shape[-1])


class _Contract(torch.autograd.Function):
    """The sum over cells; nothing but the arguments is saved."""

    @staticmethod
    def forward(x: Tensor, knots: Tensor, values: Tensor) -> Tensor:
        return _sums(x, knots, values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Tensor) -> tuple[Tensor, int]:
        def sums(x: Tensor, knots: Tensor, values: Tensor) -> Tensor:
            return torch.einsum("nib,ibo->no", _values_and_slopes(x, knots)[0], values)

        return torch.vmap(sums, in_dims)(*args), 0

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients
        x, knots, values = ctx.saved_tensors
        if torch.is_grad_enabled():  # for `create_graph`
            hats, slopes = _values_and_slopes(x, knots)
            dx = (torch.einsum("no,ibo->nib", dy, values) * slopes).sum(dim=-1)
            return dx, None, torch.einsum("nib,no->ibo", hats, dy)
        dx, dvalues = _gradients(dy, x, knots, values)
        return dx, None, dvalues


def _sums(x: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    y = x.new_zeros(x.shape[0], values.shape[-1])
    for b, hat in enumerate(_hats(x, knots)):
        y.addmm_(hat, values[:, b])
    return y


def _gradients(dy: Tensor, x: Tensor, knots: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Of x and of the values."""
    dvalues = torch.empty_like(values)
    for b, hat in enumerate(_hats(x, knots)):
        torch.mm(hat.T, dy, out=dvalues[:, b])
    slopes = values.diff(dim=1).div_(knots.diff().unsqueeze(-1))
    dx, work = torch.zeros_like(x), torch.empty_like(x)
    # One step below a knot, so that the cell right of a knot owns it.
    owned = _cells(knots.nextafter(knots.new_tensor(-math.inf)))
    for k, (_, high) in enumerate(_cells(knots)):
        torch.mm(dy, slopes[:, k].T, out=work)
        dx += _masked_(work, x, owned[k][0], high)
    return dx, dvalues


def _values_and_slopes(x: Tensor, knots: Tensor) -> tuple[Tensor, Tensor]:
    """All hats at x and their slopes, (N, in, G + 1), by operations that autograd knows."""
    cell = torch.bucketize(x.detach(), knots[1:-1], right=True)
    after = cell.unsqueeze(-1) - torch.arange(len(knots), device=x.device)
    left, right = (after == 0).to(x.dtype), (after == -1).to(x.dtype)
    widths = knots.diff()[cell].unsqueeze(-1)
    position = (x - knots[cell]).unsqueeze(-1) / widths
    return left + (right - left) * position, (right - left) / widths


def _hats(x: Tensor, knots: Tensor) -> Iterator[Tensor]:
    """Yield each hat function at x, (N, in), in a buffer that the next one reuses.

    Where a hat is zero it is exactly so: both ramps are then 0, or both h_k / h_k = 1.
    """
    ends, widths = knots.tolist(), knots.diff().tolist()
    before, ramp, hat = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
    for k, (low, high) in enumerate(_cells(knots)):
        torch.clamp(x, low, high, out=ramp).sub_(ends[k]).div_(widths[k])
        yield torch.neg(ramp, out=hat).add_(1) if k == 0 else torch.sub(before, ramp, out=hat)
        before, ramp = ramp, before
    yield before


def _masked_(gradient: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    """Zero the gradient where not low < x < high, in place."""
    masked = torch.ops.aten.hardtanh_backward.grad_input
    return masked(gradient, x, low, high, grad_input=gradient)


def _cells(knots: Tensor) -> list[tuple[float, float]]:
    """Lower and upper bound of every cell, the outermost infinite."""
    inner = knots[1:-1].tolist()
    return list(zip([-math.inf, *inner], [*inner, math.inf], strict=True))


# Named after this module, because a copy of it may travel with an exported model.
_NAMESPACE = __name__.replace(".", "_")
_compiled_sums = torch.library.custom_op(f"{_NAMESPACE}::sums", _sums, mutates_args=())
_compiled_gradients = torch.library.custom_op(
    f"{_NAMESPACE}::gradients", _gradients, mutates_args=()
)


@_compiled_sums.register_fake
def _(x: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], values.shape[-1])


@_compiled_gradients.register_fake
def _(dy: Tensor, x: Tensor, knots: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(values)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _compiled_backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, Tensor]:
    dx, dvalues = _compiled_gradients(dy, *ctx.saved_tensors)
    return dx, None, dvalues


_compiled_sums.register_autograd(_compiled_backward, setup_context=_save)
