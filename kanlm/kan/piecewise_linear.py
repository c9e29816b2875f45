"""Sums of piecewise linear functions on a CPU, at about the cost of the matrix product.

A function that is linear between knots t_0 < … < t_G, with slope s_k on cell k, is

    f(x) = f(t_0) + Σ_k s_k (clamp(x, t_k, t_{k+1}) − t_k),

where the outer cells reach to infinity. So the expansion of an input is one clamp a cell,
and a layer of such functions is a sum over cells of clamp(x) @ s_k. Cell by cell, the
expansion stays in cache and is never stored: backward clamps again.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def contract_piecewise_linear(x: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    """y_o = Σ_i f_io(x_i) for the functions with f_io(knots_k) = values_iko.

    At a knot the derivative is that from the right. It can be differentiated once.

    Arguments:
        x: (…, in), float32 or float64 on the CPU.
        knots: (G + 1,), increasing.
        values: (in, G + 1, out).

    Returns: (…, out).
    """
    flat = x.reshape(-1, x.shape[-1])
    y = _Contract.apply(flat, knots.to(x.dtype), values)
    return y.reshape(*x.shape[:-1], values.shape[-1])


class _Contract(torch.autograd.Function):
    """The sum over cells; nothing but the arguments is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, knots: Tensor, values: Tensor) -> Tensor:
        ctx.save_for_backward(x, knots, values)
        slopes = _slopes(knots, values)
        y = (values[:, 0] - knots[:-1] @ slopes).sum(0).repeat(x.shape[0], 1)
        clamped = torch.empty_like(x)
        for k, (low, high) in enumerate(_cells(knots)):
            torch.clamp(x, low, high, out=clamped)
            y.addmm_(clamped, slopes[:, k])
        return y

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator's doing)
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        (dy,) = gradients
        x, knots, values = ctx.saved_tensors
        slopes = _slopes(knots, values)
        dx, dslopes = torch.zeros_like(x), torch.empty_like(slopes)
        work = torch.empty_like(x)
        # One step below a knot, so that the cell right of a knot owns it.
        owned = _cells(knots.nextafter(knots.new_tensor(-math.inf)))
        for k, (low, high) in enumerate(_cells(knots)):
            torch.clamp(x, low, high, out=work)
            torch.mm(work.T, dy, out=dslopes[:, k])
            torch.mm(dy, slopes[:, k].T, out=work)
            dx += _masked_(work, x, owned[k][0], high)
        return dx, None, _values_gradient(knots, dslopes, dy.sum(0))


def _masked_(gradient: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    """Zero the gradient where not low < x < high, in place."""
    masked = torch.ops.aten.hardtanh_backward.grad_input
    return masked(gradient, x, low, high, grad_input=gradient)


def _slopes(knots: Tensor, values: Tensor) -> Tensor:
    """(in, G + 1, out) → (in, G, out)."""
    return values.diff(dim=1).div_(knots.diff().unsqueeze(-1))


def _values_gradient(knots: Tensor, dslopes: Tensor, dconstant: Tensor) -> Tensor:
    """From the gradients of slopes and of the constant Σ_i (v_i0 − Σ_k t_k s_ik) to v's."""
    rise = dslopes.addcmul_(knots[:-1].unsqueeze(-1), dconstant, value=-1)
    rise.div_(knots.diff().unsqueeze(-1))
    dvalues = torch.nn.functional.pad(rise, (0, 0, 1, 0))
    dvalues[:, :-1] -= rise
    dvalues[:, 0] += dconstant
    return dvalues


def _cells(knots: Tensor) -> list[tuple[float, float]]:
    """Lower and upper bound of every cell, the outermost infinite."""
    inner = knots[1:-1].tolist()
    return list(zip([-math.inf, *inner], [*inner, math.inf], strict=True))
