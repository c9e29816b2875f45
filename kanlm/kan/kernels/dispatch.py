"""Which backend adds up the edges' functions."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..base_functions import BASE_FUNCTIONS, BaseFunction
from ..bases import Basis, Differentiable, Local
from ..tracing import has_transforms, is_jit_tracing, observed
from .compiled import contract_compiled
from .few_tokens import MOST_TOKENS, Edges, few_sums
from .fused import fused_sums, no_fused_sums
from .prepared import is_decoding, prepared_modules
from .recompute import contract_recomputing

Backend = Literal["auto", "reference", "recompute", "torch", "triton", "few", "sparse"]
BACKENDS: tuple[str, ...] = get_args(Backend)
#: Those that a model can be trained with.
TrainingBackend = Literal["reference", "recompute", "torch", "triton"]

_chosen: Backend = "auto"
_preferred: TrainingBackend = "recompute"


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Take this backend within the block, in all threads, where a layer can.

    `auto`, which holds outside of all blocks, times nothing: it takes `few` for few tokens within
    `kanlm.kan.decoding`, else what `prefer_backend` names, which is `recompute` unless it was
    called, else `reference`, each where it can.

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


@contextmanager
def prefer_backend(backend: TrainingBackend) -> Iterator[None]:
    """Have `auto` take this backend within the block, in all threads, for layers that can.

    Others take `recompute` or, where they cannot, `reference`.

    Raises:
        ValueError: the backend is unknown.
    """
    global _preferred
    if backend not in get_args(TrainingBackend):
        expected = ", ".join(get_args(TrainingBackend))
        raise ValueError(f"backend = {backend!r}: expected {expected}")
    before, _preferred = _preferred, backend
    try:
        yield
    finally:
        _preferred = before


def chosen_backend() -> Backend:
    """What `use_backend` asks for."""
    return _chosen


def obstacle_of(backend: Backend, x: Tensor, coefficients: Tensor, basis: Basis) -> str | None:
    """Why a backend cannot add up such tensors, or None.

    Args:
        x: (…, in).
        coefficients: (in, B, out).
    """
    return _OBSTACLES[backend](x, coefficients, basis)


def prepared_sums(module: nn.Module, x: Tensor) -> Tensor | None:
    """What a layer or block that `kanlm.kan.decoding` has prepared adds up; None where it has to
    itself.

    Args:
        x: (…, in).

    Returns:
        (…, out).
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or _chosen != "auto":
        return None
    prepared = prepared_modules().get(module)
    if prepared is None or not prepared.can(x) or observed(x) is not None:
        return None
    return prepared(x)


def edge_sums(
    x: Tensor,
    coefficients: Tensor,
    basis: Basis,
    base: BaseFunction | None = None,
    base_weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """y_o = Σ_i [ Σ_b φ_b(x_i) c_ibo + w_oi base(x_i) ] + bias_o, by the chosen backend.

    Args:
        x: (…, in).
        coefficients: (in, B, out).
        base: function beside the basis, with `base_weight` (out, in).
        bias: (out,).

    Returns: (…, out).

    Raises:
        ValueError: the chosen backend cannot.
    """
    if base is None:
        base_weight = None
    backend = _backend(x, coefficients, basis, base_weight, bias)
    if backend in ("few", "sparse"):
        edges = Edges(coefficients, basis, base, base_weight, bias)
        return few_sums(x, edges, sparse=True if backend == "sparse" else None)
    sums = _SUMS[backend]
    y = sums(x, coefficients, basis, base, base_weight)
    return y if bias is None else y + bias.to(y.dtype)


def _backend(x: Tensor, coefficients: Tensor, basis: Basis, *others: Tensor | None) -> str:
    learns = torch.is_grad_enabled() and any(
        weight is not None and weight.requires_grad for weight in (x, coefficients, *others)
    )
    if _chosen != "auto":
        obstacle = _OBSTACLES[_chosen](x, coefficients, basis)
        if obstacle is None and _chosen in ("few", "sparse") and learns:
            obstacle = "knows no gradients: use it under torch.no_grad()"
        if obstacle is not None:
            raise ValueError(f"backend = {_chosen!r} {obstacle}")
        return _chosen
    few = is_decoding() and not learns and 0 < x.numel() <= MOST_TOKENS * x.shape[-1]
    if few and _no_few(x, coefficients, basis) is None:
        return "few"
    for backend in (_preferred, "recompute"):
        if _OBSTACLES[backend](x, coefficients, basis) is None:
            return backend
    return "reference"


# What each backend computes, and what it cannot


def _reference(
    x: Tensor,
    coefficients: Tensor,
    basis: Basis,
    base: BaseFunction | None,
    base_weight: Tensor | None,
) -> Tensor:
    y = basis.contract(x, coefficients)
    if base is None:
        return y
    assert base_weight is not None
    return y + F.linear(BASE_FUNCTIONS[base](x), base_weight)


def _recompute(
    x: Tensor,
    coefficients: Tensor,
    basis: Basis,
    base: BaseFunction | None,
    base_weight: Tensor | None,
    *,
    by_cpp: bool = True,
) -> Tensor:
    if torch.compiler.is_compiling():
        return contract_compiled(x, coefficients, basis, base, base_weight, by_cpp=by_cpp)
    assert isinstance(basis, Differentiable)
    return contract_recomputing(x, coefficients, basis, base, base_weight, by_cpp=by_cpp)


_by_torch = functools.partial(_recompute, by_cpp=False)


def _no_recompute(x: Tensor, coefficients: Tensor, basis: Basis) -> str | None:
    if not x.is_floating_point():
        return f"takes floating-point inputs, and these are {x.dtype}"
    if torch.compiler.is_compiling():
        # An operator without a tangent would be taken for a constant.
        return "is not for torch.func in compiled code" if has_transforms() else None
    if is_jit_tracing():
        return "is not for torch.jit.trace"
    if not isinstance(basis, Differentiable):
        return f"needs derivatives, and {basis.label} has none in closed form"
    if next(basis.parameters(), None) is not None:
        return f"knows no gradient of a basis's parameters, and {basis.label} has some"
    if x.dtype != coefficients.dtype and not torch.is_autocast_enabled(x.device.type):
        return f"expects inputs and coefficients of one dtype: {x.dtype}, {coefficients.dtype}"
    return None


def _no_few(x: Tensor, coefficients: Tensor, basis: Basis) -> str | None:
    if (observer := observed(x)) is not None:
        return f"is not for {observer}"
    if x.dtype != coefficients.dtype:
        return f"expects inputs and coefficients of one dtype: {x.dtype}, {coefficients.dtype}"
    return None


def _no_sparse(x: Tensor, coefficients: Tensor, basis: Basis) -> str | None:
    if not isinstance(basis, Local):
        return f"takes local bases, and {basis.label} is none"
    return _no_few(x, coefficients, basis)


_OBSTACLES: dict[str, Callable[[Tensor, Tensor, Basis], str | None]] = {
    "reference": lambda x, coefficients, basis: None,
    "recompute": _no_recompute,
    "torch": _no_recompute,
    "triton": no_fused_sums,
    "few": _no_few,
    "sparse": _no_sparse,
}

_SUMS: dict[str, Callable[..., Tensor]] = {
    "reference": _reference,
    "recompute": _recompute,
    "torch": _by_torch,
    "triton": fused_sums,
}
