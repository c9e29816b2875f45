"""Sums over edges by Triton: the basis is evaluated inside the matrix products.

No expansion is ever in the device's memory: every tile of inputs is expanded in registers,
forward and for both gradients, and backward keeps x and the parameters alone. The base's
weights are laid beside the coefficients, as those of one more function, so that the base is part
of the same product; the copy is of the size of the weights, and is made anyway where they are
cast.

torch.compile, FSDP and autograd see operators with fake kernels. They have no second derivatives,
and torch.func's transforms do not know them.

To give another basis a formula: describe it in `triton_formula`, and write its two functions in
`triton_formulas`.
"""

import functools
import importlib.util
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..base_functions import BaseFunction
from ..bases import Basis, BSpline
from ..bases.polynomials import Polynomials
from ..casts import kept
from ..compilers import no_c_compiler
from ..tracing import constant_when_traced

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class TritonFormula(NamedTuple):
    """How a basis is evaluated.

    Attributes:
        name: of its functions in `triton_formulas.FORMULAS`.
        numbers: what they are compiled with.
        knots: read when they run, because it may change while the model trains.
    """

    name: str
    numbers: list[float]
    knots: Tensor | None = None


def triton_formula(basis: Basis) -> TritonFormula | None:
    """What Triton's kernels need to know of a basis, or None where they have no formula."""
    if isinstance(basis, Polynomials):
        # For p_n times its weight, and the variable x instead of u.
        r = basis.recurrence()
        numbers = [basis.half_width, float(basis.outside == "squash"), float(basis.spans_constants)]
        for n in range(basis.degree):
            a = (r.first if n == 0 else r.a[n]) * r.scale * r.weights[n + 1] / r.weights[n]
            c = 0.0 if n == 0 else r.c[n] * r.weights[n + 1] / r.weights[n - 1]
            numbers += [a, c]
        return TritonFormula("polynomials", numbers)
    if isinstance(basis, BSpline) and basis.degree <= 3 and basis.equal_cells:
        if len(basis.knots) > 1:
            return None
        return TritonFormula("splines", [float(basis.degree)], basis.knots[0])
    return None


def no_fused_sums(x: Tensor, coefficients: Tensor, basis: Basis) -> str | None:
    """Why Triton cannot take these, or None."""
    if x.dtype not in _DTYPES:
        return f"takes float32, bfloat16 and float16, and these inputs are {x.dtype}"
    if x.dtype != coefficients.dtype and not torch.is_autocast_enabled(x.device.type):
        return f"expects inputs and coefficients of one dtype: {x.dtype}, {coefficients.dtype}"
    if triton_formula(basis) is None:
        return (
            "has formulas for polynomials and for B-splines of degree 0 to 3 on one grid of equal "
            f"cells, and this is {basis.label}"
        )
    if torch.are_deterministic_algorithms_enabled():
        return "chooses tiles by timing them, and torch is to use deterministic algorithms"
    return _unavailable(x.device.type)


def fused_sums(
    x: Tensor,
    coefficients: Tensor,
    basis: Basis,
    base: BaseFunction | None = None,
    base_weight: Tensor | None = None,
) -> Tensor:
    """A layer's outputs without bias; in the dtype of autocast if that is on.

    Products are accumulated in float32, and functions evaluated in it. As everywhere in torch,
    float32 is multiplied as TF32 where `torch.set_float32_matmul_precision` allows it.

    Args:
        x: (…, in), on an NVIDIA GPU, or on a CPU under Triton's interpreter.
        coefficients: (in, B, out).
        basis: one that `triton_formula` knows.
        base: function beside the basis, with `base_weight` (out, in).

    Returns: (…, out).
    """
    formula = triton_formula(basis)
    assert formula is not None
    flat = x.reshape(-1, x.shape[-1])
    y = _sums(
        flat,
        coefficients,
        base_weight,
        formula.knots,
        formula.name,
        formula.numbers,
        base or "none",
        _product_dtype(x, coefficients),
    )
    return y.reshape(*x.shape[:-1], coefficients.shape[-1])


def _product_dtype(x: Tensor, coefficients: Tensor) -> torch.dtype:
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return coefficients.dtype


@constant_when_traced
def _unavailable(device: str) -> str | None:
    # Apart from the cache, through which torch.compile would not see the decorator.
    return _missing(device)


@functools.cache
def _missing(device: str) -> str | None:
    """What this machine lacks, or None."""
    if importlib.util.find_spec("triton") is None:
        return "needs triton, which is not installed"
    if device == "cpu":
        from triton import knobs

        if knobs.runtime.interpret:
            return None
        return "is for NVIDIA GPUs; on a CPU it runs, very slowly, where TRITON_INTERPRET=1 is set"
    if device != "cuda" or torch.version.hip is not None:
        return f"is for NVIDIA GPUs, and these inputs are on {device}"
    if torch.cuda.get_device_capability() < (8, 0):
        return "needs a GPU of compute capability 8.0, as of an A100"
    return no_c_compiler()


# Operators. Named after this module, because a copy of it may travel with an exported model.
_NAMESPACE = __name__.replace(".", "_")


@torch.library.custom_op(f"{_NAMESPACE}::sums", mutates_args=())
def _sums(
    x: Tensor,
    coefficients: Tensor,
    base_weight: Tensor | None,
    knots: Tensor | None,
    formula: str,
    numbers: Sequence[float],
    base: str,
    dtype: torch.dtype,
) -> Tensor:
    from . import triton_launches

    if x.shape[0] == 0:
        return x.new_empty(0, coefficients.shape[-1], dtype=dtype)
    c = _all_coefficients(coefficients, base_weight, dtype)
    return triton_launches.run(
        triton_launches.sums, x.contiguous(), c, formula, tuple(numbers), knots, base
    )


@torch.library.custom_op(f"{_NAMESPACE}::input_gradients", mutates_args=())
def _input_gradients(
    dy: Tensor,
    x: Tensor,
    coefficients: Tensor,
    base_weight: Tensor | None,
    knots: Tensor | None,
    formula: str,
    numbers: Sequence[float],
    base: str,
    dtype: torch.dtype,
) -> Tensor:
    from . import triton_launches

    if x.shape[0] == 0:
        return x.new_empty(x.shape)
    c = _all_coefficients(coefficients, base_weight, dtype)
    dy, x = dy.to(dtype).contiguous(), x.contiguous()
    return triton_launches.run(
        triton_launches.input_gradients, dy, x, c, formula, tuple(numbers), knots, base
    )


@torch.library.custom_op(f"{_NAMESPACE}::coefficient_gradients", mutates_args=())
def _coefficient_gradients(
    dy: Tensor,
    x: Tensor,
    coefficients: Tensor,
    base_weight: Tensor | None,
    knots: Tensor | None,
    formula: str,
    numbers: Sequence[float],
    base: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Of the coefficients, and of the base's weights: of size 0 where there is no base."""
    from . import triton_launches

    functions = coefficients.shape[1]
    if x.shape[0] == 0:
        dbase = coefficients.new_zeros(0) if base_weight is None else _zeros(base_weight)
        return _zeros(coefficients), dbase
    dy, x = dy.to(dtype).contiguous(), x.contiguous()
    all_functions = functions + (base_weight is not None)
    parts = triton_launches.run(
        triton_launches.coefficient_gradients,
        *(dy, x, all_functions, formula, tuple(numbers), knots, base),
    )
    dc = parts[0] if len(parts) == 1 else parts.sum(dim=0)
    if base_weight is None:
        return dc.to(coefficients.dtype), coefficients.new_empty(0)
    dbase = dc[:, functions].T.to(base_weight.dtype, memory_format=torch.contiguous_format)
    return dc[:, :functions].to(coefficients.dtype, copy=True).contiguous(), dbase.contiguous()


def _all_coefficients(
    coefficients: Tensor, base_weight: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """With the base's weights as the last function, contiguous in a dtype."""

    def make() -> Tensor:
        if base_weight is None:
            return coefficients.to(dtype).contiguous()
        inputs, functions, outputs = coefficients.shape
        both = coefficients.new_empty(inputs, functions + 1, outputs, dtype=dtype)
        both[:, :functions] = coefficients
        both[:, functions] = base_weight.T
        return both

    return kept(make, dtype, coefficients, base_weight)


def _zeros(tensor: Tensor) -> Tensor:
    return tensor.new_zeros(tensor.shape)


@_sums.register_fake
def _(x: Tensor, coefficients: Tensor, *others: Any) -> Tensor:
    return x.new_empty(x.shape[0], coefficients.shape[-1], dtype=others[-1])


@_input_gradients.register_fake
def _(dy: Tensor, x: Tensor, *others: Any) -> Tensor:
    return x.new_empty(x.shape)


@_coefficient_gradients.register_fake
def _(
    dy: Tensor, x: Tensor, coefficients: Tensor, base_weight: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor]:
    shape = (0,) if base_weight is None else base_weight.shape
    dtype = coefficients if base_weight is None else base_weight
    return coefficients.new_empty(coefficients.shape), dtype.new_empty(shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.formula, ctx.numbers, ctx.base, ctx.dtype = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    arguments = (*ctx.saved_tensors, ctx.formula, ctx.numbers, ctx.base, ctx.dtype)
    need_x, need_coefficients, need_base, *_ = ctx.needs_input_grad
    dx = dc = dbase = None
    if need_x:
        dx = _input_gradients(dy, *arguments)
    if need_coefficients or need_base:
        dc, dbase = _coefficient_gradients(dy, *arguments)
    return (
        dx,
        dc if need_coefficients else None,
        dbase if need_base else None,
        *[None] * 5,
    )


def _no_second_derivatives(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError(
        "the triton backend has no second derivatives: use_backend('recompute') has"
    )


_sums.register_autograd(_backward, setup_context=_save)
_input_gradients.register_autograd(_no_second_derivatives)
_coefficient_gradients.register_autograd(_no_second_derivatives)
