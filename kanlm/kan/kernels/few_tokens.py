"""Layers' outputs for a few tokens, reading each coefficient that plays a part once, as it lies.

Decoding one token is bound by the bytes of weights that it reads, and an ordinary product first
copies the coefficients into another order. Of a local basis's B functions only `support` differ
from zero at an input, and the coefficients of neighbouring functions lie side by side, so a token
needs support / B of them, beside all weights of the base.

On a CPU with a C++ compiler few_tokens.cpp reads them. It adds up in float32; functions of bfloat16
inputs are rounded before that, as they are for torch's products, where the processor multiplies
bfloat16, the basis is not local and there are more than two tokens. Elsewhere torch does: with a
product over the flattened (in, B), and of local bases with `embedding_bag`, which adds up weighted
rows.
"""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..base_functions import BASE_CODES, BASE_FUNCTIONS, BaseFunction
from ..bases import Basis, BSpline, Differentiable, Local
from ..bases.formulas import Formulas
from ..cpp_build import load_library
from ..plain_tensors import is_cpu_float32, is_plain

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
        norm: gain (in,) and epsilon of an RMS norm that the inputs go through first.
    """

    coefficients: Tensor
    basis: Basis
    base: BaseFunction | None = None
    base_weight: Tensor | None = None
    bias: Tensor | None = None
    norm: tuple[Tensor, float] | None = None

    @property
    def tensors(self) -> list[Tensor | None]:
        """Those of the type of the inputs."""
        gain = None if self.norm is None else self.norm[0]
        return [gain, self.coefficients, self.base_weight, self.bias]

    def check(self, width: int) -> None:
        """
        Raises:
            ValueError: there are other than `width` inputs, or weights are of other shapes than the
                coefficients say: few_tokens.cpp would read past their ends.
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
        for weight, shape in zip(self.tensors, shapes, strict=True):
            if weight is not None and weight.shape != shape:
                raise ValueError(f"weights of shape {tuple(weight.shape)}: expected {shape}")


def few_sums(x: Tensor, edges: Edges, *, sparse: bool | None = None) -> Tensor:
    """Outputs of a layer, exact to rounding, without gradients.

    Arguments:
        x: (…, in).
        sparse: whether torch is to read single rows of a local basis; None where it is faster.

    Returns: (…, out).

    Raises:
        ValueError: weights do not fit each other or the inputs.
    """
    edges.check(x.shape[-1])
    y = _native_sums(x, edges)
    if y is not None:
        return y
    if edges.norm is not None:
        gain, epsilon = edges.norm
        x = F.rms_norm(x, gain.shape, gain, epsilon)
    if sparse is None:
        few = x.device.type == "cpu" and x.numel() <= MOST_TOKENS_OF_TORCH * x.shape[-1]
        sparse = isinstance(edges.basis, Local) and few
    y = _sparse_product(x, edges) if sparse else _product(x, edges)
    if edges.base is not None:
        assert edges.base_weight is not None
        y = y + F.linear(BASE_FUNCTIONS[edges.base](x), edges.base_weight)
    return y if edges.bias is None else y + edges.bias


def _native_sums(x: Tensor, edges: Edges) -> Tensor | None:
    """By few_tokens.cpp; None where it cannot, or torch is faster."""
    basis, functions = edges.basis, edges.coefficients.shape[1]
    support = basis.support if isinstance(basis, Local) else functions
    if x.dtype not in _functions() or x.device.type != "cpu" or not is_plain(x):
        return None
    if support < functions and support > MOST_FUNCTIONS:
        return None
    if not all(_plain(weight, x.dtype) for weight in edges.tensors):
        return None
    function = _functions()[x.dtype]
    layer = _known(edges)
    if layer is not None:
        return _call(function, (_Layer * 1)(layer), x)
    if edges.norm is not None:
        gain, epsilon = edges.norm
        x, edges = F.rms_norm(x, gain.shape, gain, epsilon), edges._replace(norm=None)
    first = None
    if isinstance(basis, Local) and support < functions:
        first, values = basis.active(x.float())
        first = first.contiguous()
    else:
        values = basis.values(x.float()).transpose(-1, -2)
    layers = (_Layer * 1)(_described(edges, support))
    return _call(function, layers, x, first, values.float().contiguous())


class _Layer(ctypes.Structure):
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


class Prepared:
    """Layers in a row as few_tokens.cpp takes them: it is told where their tensors lie, and finds
    all functions' values by itself.

    The tensors that it was made of are kept, and what they hold then is read at every call.
    """

    def __init__(
        self, layers: Sequence[Edges], dtype: torch.dtype, parts: Sequence[_Layer]
    ) -> None:
        self.dtype = dtype
        self.inputs = layers[0].coefficients.shape[0]
        self._function = _functions()[dtype]
        self._layers = (_Layer * len(layers))(*parts)
        # Also the memory itself: `data` of a parameter may be put in another's place.
        tensors = [t for layer in layers for t in (*layer.tensors, _knots(layer.basis))]
        self._kept = (parts, [None if t is None else t.untyped_storage() for t in tensors])

    @classmethod
    def of(cls, layers: Sequence[Edges], dtype: torch.dtype) -> "Prepared | None":
        """For inputs of a type; None where they or a layer are not for few_tokens.cpp alone.

        Arguments:
            layers: which fit each other, as `Edges.check` has it.
        """
        if dtype not in _functions():
            return None
        parts = []
        for layer in layers:
            part = _known(layer)
            if part is None or not all(_plain(weight, dtype) for weight in layer.tensors):
                return None
            parts.append(part)
        return cls(layers, dtype, parts)

    def can(self, x: Tensor) -> bool:
        """Whether inputs are of the type and width, plain ones on a CPU, and few."""
        return (
            x.dtype == self.dtype
            and x.device.type == "cpu"
            and x.shape[-1] == self.inputs
            and 0 < x.numel() <= MOST_TOKENS * self.inputs
            and is_plain(x)
        )

    def __call__(self, x: Tensor) -> Tensor:
        return _call(self._function, self._layers, x)


def _described(
    layer: Edges,
    support: int,
    knots: Tensor | None = None,
    formulas: Formulas | None = None,
    structure: Any = None,
) -> _Layer:
    functions = layer.coefficients.shape[1]
    return _Layer(
        *map(_pointer, layer.tensors),
        _pointer(knots),
        None if structure is None else ctypes.addressof(structure),
        None if formulas is None else formulas.places[0],
        *layer.coefficients.shape,
        support,
        BASE_CODES[layer.base],
        functions - support + 1,
        0.0 if layer.norm is None else layer.norm[1],
    )


def _call(
    function: "ctypes._NamedFuncPointer",
    layers: "ctypes.Array[_Layer]",
    x: Tensor,
    first: Tensor | None = None,
    values: Tensor | None = None,
) -> Tensor:
    """Call few_tokens.cpp; with `first` and `values` of a basis that it does not know."""
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], layers[len(layers) - 1].out)
    done = function(
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


def _known(layer: Edges) -> _Layer | None:
    """The layer of a basis whose values few_tokens.cpp finds; it lives as long as what it tells."""
    basis = layer.basis
    if (knots := _knots(basis)) is not None:
        assert isinstance(basis, BSpline)
        return _described(layer, basis.support, knots)
    if (formulas := _formulas(basis)) is None:
        return None
    structure = formulas.structure
    part = _described(layer, basis.num_functions, None, formulas, structure)
    part.kept = formulas, structure
    return part


def _knots(basis: Basis) -> Tensor | None:
    """Of a grid on which few_tokens.cpp finds what differs from zero: B-splines on equal cells for
    all inputs."""
    # A class of somebody else's may have other values.
    if type(basis) is not BSpline or not basis.equal_cells or len(basis.knots) != 1:
        return None
    if basis.degree == 0 or basis.support == basis.num_functions:
        # A step is on the other side of a knot already where the cell is off by rounding.
        return None
    return basis.knots if is_cpu_float32(basis.knots) else None


def _formulas(basis: Basis) -> Formulas | None:
    """Of a basis all of whose functions differ from zero, if they can be compiled."""
    if isinstance(basis, Local) or not isinstance(basis, Differentiable):
        return None
    formulas = basis.formulas()
    if formulas is None or not formulas.reads_plain_parameters or formulas.library is None:
        return None
    return formulas


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


@functools.cache
def _functions() -> "dict[torch.dtype, ctypes._NamedFuncPointer]":
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


def _plain(weight: Tensor | None, dtype: torch.dtype) -> bool:
    if weight is None:
        return True
    alike = weight.dtype == dtype and weight.device.type == "cpu"
    return alike and is_plain(weight) and weight.is_contiguous()


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
