"""Layers' outputs for a few tokens, reading each coefficient that plays a part once, as it lies.

Decoding one token is bound by the bytes of weights that it reads, and an ordinary product first
copies the coefficients into another order. Of a local basis's B functions only `support` differ
from zero at an input, and the coefficients of neighbouring functions lie side by side, so a token
needs support / B of them, beside all weights of the base.

On a CPU with a C++ compiler few_tokens.cpp reads them, in code that torch.compile traces as an
operator. It adds up in float32; functions of bfloat16 inputs are rounded before that, as they are
for torch's products, where the processor multiplies bfloat16, the basis is not local and there are
more than two tokens. Elsewhere torch does: with a product over the flattened (in, B), and of local
bases with `embedding_bag`, which adds up weighted rows.
"""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from ..base_functions import BASE_CODES, BASE_FUNCTIONS, BaseFunction
from ..bases import Basis, BSpline, Differentiable, Local
from ..bases.cpp_formulas import CppFormulas
from ..cpp_build import load_library
from ..plain_tensors import is_cpu_float32, is_plain
from ..tracing import constant_when_traced

#: Most tokens at a time that are few: for which this was faster than other products at every width
#: and grid tried (`./scripts/bench decode`). Torch's embedding_bag is for fewer.
MOST_TOKENS, MOST_TOKENS_OF_TORCH = 64, 4

#: Functions of a local basis that may differ from zero at an input in few_tokens.cpp.
MOST_FUNCTIONS = 6

_NAMES = {torch.float32: "sums_float32", torch.bfloat16: "sums_bfloat16"}


class Edges(NamedTuple):
    """What is added up in a layer, as of `edge_sums`.

    Attributes:
        coefficients: (in, B, out).
        base: function beside the basis, with `base_weight` (out, in).
        bias: (out,).
        norm: gain (in,) and epsilon of an RMS norm that the inputs go through first, in a row of
            layers that are prepared.
    """

    coefficients: Tensor
    basis: Basis
    base: BaseFunction | None = None
    base_weight: Tensor | None = None
    bias: Tensor | None = None
    norm: tuple[Tensor, float] | None = None

    @property
    def weights(self) -> list[Tensor | None]:
        """Those of the type of the inputs."""
        gain = None if self.norm is None else self.norm[0]
        return [gain, self.coefficients, self.base_weight, self.bias]

    def check(self, width: int) -> None:
        """Check that weights fit: few_tokens.cpp would read past their ends.

        Raises:
            ValueError: there are other than `width` inputs, or weights are of other shapes than the
                coefficients say.
        """
        inputs, functions, out = self.coefficients.shape
        if width != inputs:
            raise ValueError(f"x has {width} channels: expected {inputs}")
        if functions != self.basis.num_functions:
            raise ValueError(
                f"coefficients of {functions} functions: the basis has {self.basis.num_functions}"
            )
        if self.base is not None and self.base_weight is None:
            raise ValueError(f"base = {self.base!r}: it has no weights")
        shapes = (inputs,), (inputs, functions, out), (out, inputs), (out,)
        for weight, shape in zip(self.weights, shapes, strict=True):
            if weight is not None and weight.shape != shape:
                raise ValueError(f"weights of shape {tuple(weight.shape)}: expected {shape}")


def few_sums(x: Tensor, edges: Edges, *, sparse: bool | None = None) -> Tensor:
    """Outputs of a layer, exact to rounding, without gradients.

    Args:
        x: (…, in).
        sparse: whether torch is to read single rows of a local basis; None where it is faster.

    Returns:
        (…, out).

    Raises:
        ValueError: weights do not fit each other or the inputs.
    """
    edges.check(x.shape[-1])
    y = _sums_by_cpp(x, edges)
    if y is not None:
        return y
    if sparse is None:
        few = x.device.type == "cpu" and x.numel() <= MOST_TOKENS_OF_TORCH * x.shape[-1]
        sparse = isinstance(edges.basis, Local) and few
    y = _sparse_product(x, edges) if sparse else _product(x, edges)
    if edges.base is not None:
        assert edges.base_weight is not None
        y = y + F.linear(BASE_FUNCTIONS[edges.base](x), edges.base_weight)
    return y if edges.bias is None else y + edges.bias


def readable_by_cpp(edges: Edges, dtype: torch.dtype) -> bool:
    """Whether few_tokens.cpp is compiled, and can read weights of a type where they lie."""
    if not _compiles(dtype):
        return False
    given = [weight for weight in edges.weights if weight is not None]
    return all(
        t.dtype == dtype and t.device.type == "cpu" and is_plain(t) and t.is_contiguous()
        for t in given
    )


# What few_tokens.cpp is told


class CppLayer(ctypes.Structure):
    """As `Layer` in few_tokens.cpp."""

    _fields_: ClassVar = [
        *[(name, ctypes.c_void_p) for name in ("norm", "coefficients", "base_weight", "bias")],
        *[(name, ctypes.c_void_p) for name in ("knots", "basis", "evaluate")],
        *[
            (name, ctypes.c_int64)
            for name in ("inputs", "functions", "out", "support", "base_kind", "cells")
        ],
        ("epsilon", ctypes.c_float),
    ]


class Evaluated(NamedTuple):
    """How few_tokens.cpp evaluates a basis: by the functions of a C++ file of a basis, or
    without a source as B-splines on equal cells.

    Attributes:
        source, numbers, knots, learned: as of `CppFormulas`.
    """

    source: str
    numbers: tuple[float, ...]
    knots: Tensor | None
    learned: Tensor | None

    @classmethod
    def of(cls, basis: Basis) -> "Evaluated | None":
        """None for a basis that few_tokens.cpp has to be given the values of."""
        # A class of somebody else's may have other values.
        if type(basis) is BSpline and basis.equal_cells and len(basis.knots) == 1:
            # A step is on the other side of a knot already where the cell is off by rounding.
            sparse = basis.degree > 0 and basis.support < basis.num_functions
            return (
                cls("", (), basis.knots, None) if sparse and is_cpu_float32(basis.knots) else None
            )
        if isinstance(basis, Local) or not isinstance(basis, Differentiable):
            return None
        formulas = basis.cpp_formulas()
        if formulas is None or not formulas.reads_plain_parameters:
            return None
        if not _has_functions(formulas.source):
            return None
        return cls(formulas.source, formulas.numbers, formulas.knots, formulas.learned)


#: Of a basis that few_tokens.cpp is given the values of.
_GIVEN = Evaluated("", (), None, None)


def describe(edges: Edges, evaluated: Evaluated | None) -> CppLayer:
    """What few_tokens.cpp has to know of a layer; tensors have to live as long."""
    return _described(
        edges.coefficients,
        edges.base_weight,
        edges.bias,
        edges.base,
        _support(edges.basis),
        evaluated,
        edges.norm,
    )


def call_cpp(
    layers: "ctypes.Array[CppLayer]",
    x: Tensor,
    first: Tensor | None = None,
    values: Tensor | None = None,
) -> Tensor:
    """Call few_tokens.cpp.

    Args:
        layers: one after the other, of the type of the inputs.
        x: (…, in).
        first, values: of a basis that it does not evaluate: indices of the first functions that
            differ from zero, (…, in), unless all do, and the values, (…, in, support) or
            (…, B, in).

    Returns:
        (…, out).

    Raises:
        MemoryError: there is no memory for the sums.
    """
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], layers[len(layers) - 1].out)
    done = _functions()[x.dtype](
        layers,
        len(layers),
        x.data_ptr(),
        y.data_ptr(),
        _pointer(first),
        _pointer(values),
        x.numel() // x.shape[-1],
        torch.get_num_threads(),
    )
    if not done:
        raise MemoryError("no memory for the sums of so many tokens")
    return y


def _sums_by_cpp(x: Tensor, edges: Edges) -> Tensor | None:
    """By few_tokens.cpp; None where it cannot."""
    basis, functions = edges.basis, edges.coefficients.shape[1]
    support = _support(basis)
    if x.device.type != "cpu" or not is_plain(x) or not readable_by_cpp(edges, x.dtype):
        return None
    if MOST_FUNCTIONS < support < functions:
        return None
    first = values = None
    evaluated = Evaluated.of(basis)
    if evaluated is None:
        if isinstance(basis, Local) and support < functions:
            first, values = basis.active(x.float())
            first = first.contiguous()
        else:
            values = basis.values(x.float()).transpose(-1, -2)
        values = values.float().contiguous()
    given = (x, edges.coefficients, edges.base_weight, edges.bias, edges.base or "", support)
    sums = _operator if torch.compiler.is_compiling() else _sums
    return sums(*given, *(evaluated or _GIVEN), first, values)


def _sums(
    x: Tensor,
    coefficients: Tensor,
    base_weight: Tensor | None,
    bias: Tensor | None,
    base: str,
    support: int,
    source: str,
    numbers: Sequence[float],
    knots: Tensor | None,
    learned: Tensor | None,
    first: Tensor | None,
    values: Tensor | None,
) -> Tensor:
    """`call_cpp` of a layer, given as an operator can be."""
    evaluated = Evaluated(source, tuple(numbers), knots, learned)
    known_base = cast(BaseFunction | None, base or None)
    layer = _described(coefficients, base_weight, bias, known_base, support, evaluated)
    return call_cpp((CppLayer * 1)(layer), x, first, values)


# An operator for code that torch.compile traces. Named after this module, because a copy of it may
# travel with an exported model. It has no gradient, and is dispatched in a fraction of the time
# that `torch.library.custom_op` takes, which is about that of reading a small layer.
_NAMESPACE = __name__.replace(".", "_")
globals().pop("_library", None)  # of the same module, if it is executed again
_library = torch.library.Library(_NAMESPACE, "FRAGMENT")
_library.define(f"sums{torch.library.infer_schema(_sums, mutates_args=())}")
_library.impl("sums", _sums, "CPU")
_operator = getattr(torch.ops, _NAMESPACE).sums.default


@torch.library.register_fake(f"{_NAMESPACE}::sums", lib=_library)
def _(x: Tensor, coefficients: Tensor, *others: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], coefficients.shape[-1])


def _described(
    coefficients: Tensor,
    base_weight: Tensor | None,
    bias: Tensor | None,
    base: BaseFunction | None,
    support: int,
    evaluated: Evaluated | None,
    norm: tuple[Tensor, float] | None = None,
) -> CppLayer:
    inputs, functions, out = coefficients.shape
    gain, epsilon = (None, 0.0) if norm is None else norm
    source, numbers, knots, learned = evaluated or _GIVEN
    formulas = structure = None
    if source:
        formulas = CppFormulas(source, functions, numbers, knots, learned)
        structure = formulas.structure
    layer = CppLayer(
        *map(_pointer, (gain, coefficients, base_weight, bias)),
        None if source else _pointer(knots),
        None if structure is None else ctypes.addressof(structure),
        None if formulas is None else formulas.addresses[0],
        *(inputs, functions, out, support),
        BASE_CODES[base],
        functions - support + 1,
        epsilon,
    )
    # What it points to lives as long as it does.
    layer.kept = gain, coefficients, base_weight, bias, knots, learned, structure
    return layer


def _support(basis: Basis) -> int:
    return basis.support if isinstance(basis, Local) else basis.num_functions


@constant_when_traced
def _compiles(dtype: torch.dtype) -> bool:
    return dtype in _functions()


@constant_when_traced
def _has_functions(source: str) -> bool:
    """Whether a basis's C++ file is compiled."""
    return CppFormulas(source, 0, ()).library is not None


@functools.cache
def _functions() -> dict[torch.dtype, Any]:
    """By the type of inputs and weights; none where they cannot be compiled."""
    library = load_library(Path(__file__).with_name("few_tokens.cpp"), *_NAMES.values())
    if library is None:
        return {}
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    functions = {dtype: getattr(library, name) for dtype, name in _NAMES.items()}
    for function in functions.values():
        function.argtypes = [pointer, count, *[pointer] * 4, count, count]
        function.restype = ctypes.c_bool
    return functions


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


# What torch computes


def _product(x: Tensor, edges: Edges) -> Tensor:
    """All coefficients by one product, which takes them as they lie."""
    return edges.basis.values(x).flatten(-2) @ edges.coefficients.flatten(0, 1)


def _sparse_product(x: Tensor, edges: Edges) -> Tensor:
    """The coefficients of functions that differ from zero."""
    basis, coefficients = edges.basis, edges.coefficients
    assert isinstance(basis, Local)
    inputs, functions, out = coefficients.shape
    first, values = basis.active(x.reshape(-1, inputs))
    start = torch.arange(0, inputs * functions, functions, device=x.device)
    rows = (first + start).unsqueeze(-1) + torch.arange(basis.support, device=x.device)
    sums = F.embedding_bag(
        rows.flatten(1),
        coefficients.reshape(-1, out),
        mode="sum",
        per_sample_weights=values.flatten(1).to(coefficients.dtype),
    )
    return sums.view(*x.shape[:-1], out)
