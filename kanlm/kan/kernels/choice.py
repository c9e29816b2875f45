"""Which backend adds up the edges' functions."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from ..base_functions import BASE_FUNCTIONS, BaseFunction
from ..bases import Basis, BSpline, Differentiable, Local
from .fused import fused_sums, no_fused_sums, pays
from .piecewise_linear import contract_piecewise_linear
from .recompute import SILU, contract_compiled, contract_recomputing
from .sparse import most_tokens, sparse_sums

Backend = Literal["auto", "reference", "recompute", "piecewise-linear", "triton", "sparse"]
BACKENDS: tuple[str, ...] = get_args(Backend)

_chosen: Backend = "auto"


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Take this backend within the block, in all threads, where a layer can.

    `auto`, which holds outside of all blocks, takes the fastest.

    Raises:
        ValueError: the backend is unknown; and layers raise it where their basis, device or
            dtype is not one that the backend is for.
    """
    global _chosen
    if backend not in BACKENDS:
        raise ValueError(f"backend = {backend!r}: expected {', '.join(BACKENDS)}")
    before, _chosen = _chosen, backend
    try:
        yield
    finally:
        _chosen = before


def edge_sums(
    x: Tensor,
    coefficients: Tensor,
    basis: Basis,
    base: BaseFunction | None = None,
    base_weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """y_o = Σ_i [ Σ_b φ_b(x_i) c_ibo + w_oi base(x_i) ] + bias_o, by the chosen backend or the
    fastest.

    Arguments:
        x: (…, in).
        coefficients: (in, B, out).
        base: function beside the basis, with `base_weight` (out, in).
        bias: (out,).

    Returns: (…, out).

    Raises:
        ValueError: the chosen backend cannot.
    """
    backend = _backend(x, coefficients, basis)
    if backend == "sparse":
        assert isinstance(basis, Local)
        return sparse_sums(x, coefficients, basis, base, base_weight, bias)
    if backend == "triton":
        y = fused_sums(x, coefficients, basis, base, base_weight)
        return y if bias is None else y + bias.to(y.dtype)
    y = _FUNCTIONS[backend](x, coefficients, basis)
    if base is not None:
        assert base_weight is not None
        if backend == "reference":
            y = y + F.linear(BASE_FUNCTIONS[base](x), base_weight)
        elif base == "silu":
            y = y + _recompute(x, base_weight.T.unsqueeze(1), SILU)
        else:
            y = y + F.linear(x, base_weight)
    return y if bias is None else y + bias.to(y.dtype)


def reads_sparsely(x: Tensor, coefficients: Tensor, basis: Basis) -> bool:
    """Whether `edge_sums` would take the sparse backend."""
    return _backend(x, coefficients, basis) == "sparse"


def _backend(x: Tensor, coefficients: Tensor, basis: Basis) -> str:
    if _chosen != "auto":
        obstacle = _OBSTACLES[_chosen](x, coefficients, basis)
        if obstacle is not None:
            raise ValueError(f"backend = {_chosen!r} {obstacle}")
        return _chosen
    if _no_sparse(x, coefficients, basis) is None and _few(x):
        return "sparse"
    backends = ["piecewise-linear", "recompute"]
    if x.device.type == "cuda" and pays(x, coefficients):
        backends.insert(0, "triton")
    for backend in backends:
        if _OBSTACLES[backend](x, coefficients, basis) is None:
            return backend
    return "reference"


def _few(x: Tensor) -> bool:
    return 0 < x.numel() <= most_tokens(x) * x.shape[-1]


# What each backend computes, and what it cannot


def _recompute(x: Tensor, coefficients: Tensor, basis: Basis) -> Tensor:
    if torch.compiler.is_compiling():
        return contract_compiled(x, coefficients, basis)
    assert isinstance(basis, Differentiable)
    return contract_recomputing(x, coefficients, basis)


def _no_recompute(x: Tensor, coefficients: Tensor, basis: Basis) -> str | None:
    if not x.is_floating_point():
        return f"takes floating-point inputs, and these are {x.dtype}"
    if torch.compiler.is_compiling():
        return None
    if not isinstance(basis, Differentiable):
        return f"needs derivatives, and {basis.label} has none in closed form"
    if next(basis.parameters(), None) is not None:
        return f"knows no gradient of a basis's parameters, and {basis.label} has some"
    if x.dtype != coefficients.dtype and not torch.is_autocast_enabled(x.device.type):
        return f"expects inputs and coefficients of one dtype: {x.dtype}, {coefficients.dtype}"
    return None


def _piecewise_linear(x: Tensor, coefficients: Tensor, basis: Basis) -> Tensor:
    assert isinstance(basis, BSpline)
    return contract_piecewise_linear(x, basis.grid.to(x.dtype)[0], coefficients)


def _no_piecewise_linear(x: Tensor, coefficients: Tensor, basis: Basis) -> str | None:
    if not isinstance(basis, BSpline) or basis.degree != 1 or len(basis.knots) > 1:
        return f"takes linear B-splines on one grid, and this is {basis.label}"
    if x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return "is for a CPU without autocast"
    if x.dtype not in (torch.float32, torch.float64):
        return f"takes float32 and float64, and these inputs are {x.dtype}"
    return None


def _no_sparse(x: Tensor, coefficients: Tensor, basis: Basis) -> str | None:
    if not isinstance(basis, Local):
        return f"takes local bases, and {basis.label} is none"
    if torch.is_grad_enabled() and (x.requires_grad or coefficients.requires_grad):
        return "knows no gradients: use it under torch.no_grad()"
    if torch.compiler.is_compiling():
        return "is not for compiled code"
    if torch.is_autocast_enabled(x.device.type):
        return "is not for autocast"
    return None


_FUNCTIONS: dict[str, Callable[[Tensor, Tensor, Basis], Tensor]] = {
    "reference": lambda x, coefficients, basis: basis.contract(x, coefficients),
    "recompute": _recompute,
    "piecewise-linear": _piecewise_linear,
}
_OBSTACLES: dict[str, Callable[[Tensor, Tensor, Basis], str | None]] = {
    "reference": lambda x, coefficients, basis: None,
    "recompute": _no_recompute,
    "piecewise-linear": _no_piecewise_linear,
    "triton": no_fused_sums,
    "sparse": _no_sparse,
}
