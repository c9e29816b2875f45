"""Sums over edges by cpu_gemm.cpp, which evaluates the basis inside its products: for float32 on
a CPU, and bases that have formulas in C++.
"""

import ctypes
import functools
import platform
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from .. import plain_tensors
from ..base_functions import BASE_CODES, BaseFunction
from ..bases.cpp_formulas import CppFormulas
from ..cpp_build import load_library


def compiles(formulas: CppFormulas) -> bool:
    """Whether there is a compiler for it all, and a processor on which it has been timed: tiles
    that suit the registers of another may be slower than its own library."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    return _library() is not None and formulas.library is not None


def can(formulas: CppFormulas | None, x: Tensor, *others: Tensor | None) -> TypeGuard[CppFormulas]:
    """Whether a basis has formulas and tensors like these can be taken: float32 on a CPU, and
    there are tokens."""
    if formulas is None or x.numel() == 0:
        return False
    return all(t is None or plain_tensors.is_cpu_float32(t) for t in (x, *others)) and compiles(
        formulas
    )


def sums(
    formulas: CppFormulas,
    x: Tensor,
    coefficients: Tensor,
    base_weight: Tensor | None,
    base: BaseFunction | None,
) -> Tensor:
    """(N, in) → (N, out).

    Args:
        coefficients: (in, B, out).
        base: function beside the basis, with `base_weight` (out, in).

    Raises:
        ValueError: shapes do not fit.
        MemoryError: there is none for the weights in another order.
    """
    if x.shape[-1] != coefficients.shape[0]:
        raise ValueError(f"x has {x.shape[-1]} channels: expected {coefficients.shape[0]}")
    x = x.contiguous()
    y = x.new_empty(x.shape[0], coefficients.shape[-1])
    edges = _Edges.of(formulas, coefficients, base_weight, base)
    _call(_library().edge_sums, edges, x, y)
    return y


def gradients(
    formulas: CppFormulas,
    dy: Tensor,
    x: Tensor,
    coefficients: Tensor,
    base_weight: Tensor | None,
    base: BaseFunction | None,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, coefficients and base weights for dy (N, out), each laid out as what it
    is of.

    Args: as of `sums`, and
        needs: whether that of x is asked for, and whether those of the weights are.

    Raises:
        MemoryError: there is none for the weights and their gradients in another order.
    """
    need_dx, need_weights = needs
    contiguous = torch.contiguous_format
    dx = torch.empty_like(x, memory_format=contiguous) if need_dx else None
    weights = (coefficients, base_weight) if need_weights else (None, None)
    dcoefficients, dbase = (
        None if weight is None else torch.empty_like(weight, memory_format=contiguous)
        for weight in weights
    )
    edges = _Edges.of(formulas, coefficients, base_weight, base)
    x, dy = x.contiguous(), dy.contiguous()
    _call(_library().edge_gradients, edges, x, dy, dx, dcoefficients, dbase)
    return dx, dcoefficients, dbase


class _Edges(ctypes.Structure):
    """As `Edges` in cpu_gemm.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("basis", "values", "pull_back")),
        *((name, ctypes.c_void_p) for name in ("coefficients", "base_weight")),
        *((name, ctypes.c_int64) for name in ("base", "functions", "inputs", "out")),
    )

    @classmethod
    def of(
        cls,
        formulas: CppFormulas,
        coefficients: Tensor,
        base_weight: Tensor | None,
        base: BaseFunction | None,
    ) -> "_Edges":
        inputs, functions, out = coefficients.shape
        # C++ would read and write past their ends.
        if functions != formulas.num_functions:
            raise ValueError(
                f"coefficients of {functions} functions: the basis has {formulas.num_functions}"
            )
        shape = None if base_weight is None else tuple(base_weight.shape)
        expected = None if base is None else (out, inputs)
        if shape != expected:
            raise ValueError(f"base_weight of shape {shape}: expected {expected}")
        structure = formulas.structure
        kept = [t if t is None else t.contiguous() for t in (coefficients, base_weight)]
        edges = cls(
            ctypes.addressof(structure),
            *formulas.addresses,
            *(None if t is None else t.data_ptr() for t in kept),
            BASE_CODES[base],
            functions,
            inputs,
            out,
        )
        # What it points to lives as long as it does.
        edges.kept = (formulas, structure, *kept)
        return edges


def _call(function: Any, edges: _Edges, x: Tensor, *others: Tensor | None) -> None:
    pointers = [None if t is None else t.data_ptr() for t in (x, *others)]
    if not function(ctypes.byref(edges), *pointers, x.shape[0], torch.get_num_threads()):
        raise MemoryError("no memory for the weights of a KAN layer in another order")


@functools.cache
def _library() -> Any:
    source = Path(__file__).with_name("cpu_gemm.cpp")
    library = load_library(source, "edge_sums", "edge_gradients")
    if library is None:
        return None
    for function, tensors in ((library.edge_sums, 2), (library.edge_gradients, 5)):
        pointers = [ctypes.c_void_p] * tensors
        function.argtypes = [ctypes.POINTER(_Edges), *pointers, *[ctypes.c_int64] * 2]
        function.restype = ctypes.c_bool
    return library
