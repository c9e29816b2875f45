"""A layer's outputs for a few tokens, from those coefficients alone that play a part.

Decoding one token is bound by the bytes of weights that it reads. Of a local basis's B
functions only `support` differ from zero at an input, and the coefficients of neighbouring
functions lie side by side, so a token needs support / B of them, beside all weights of the base.

On a CPU with a C++ compiler, sparse.cpp reads them; elsewhere torch's `embedding_bag`, which adds
up weighted rows of a table.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..base_functions import BASE_CODES, BASE_FUNCTIONS, BaseFunction
from ..bases import BSpline, Local
from ..native import holds_floats, is_plain, load_library

#: Most tokens at a time for which reading rows was faster than dense products at every width
#: and grid tried (`kanlm bench decode`): with sparse.cpp, and with embedding_bag.
NATIVE_TOKENS, TORCH_TOKENS = 64, 4

#: Functions that may differ from zero at an input in sparse.cpp.
MOST_FUNCTIONS = 6

_NAMES = {torch.float32: "sums_float32", torch.bfloat16: "sums_bfloat16"}


def most_tokens(x: Tensor) -> int:
    """How many tokens may be asked for at a time before dense products are faster."""
    return TORCH_TOKENS if _native(x) is None else NATIVE_TOKENS


class SparseLayer(NamedTuple):
    """What is added up in a layer, as of `edge_sums`.

    Attributes:
        coefficients: (in, B, out).
        base: function beside the basis, with `base_weight` (out, in).
        bias: (out,).
        norm: gain (in,) and epsilon of an RMS norm that the inputs go through first.
    """

    coefficients: Tensor
    basis: Local
    base: BaseFunction | None = None
    base_weight: Tensor | None = None
    bias: Tensor | None = None
    norm: tuple[Tensor, float] | None = None

    @property
    def tensors(self) -> list[Tensor | None]:
        """Those of the type of the inputs."""
        gain = None if self.norm is None else self.norm[0]
        return [gain, self.coefficients, self.base_weight, self.bias]


def sparse_sums(x: Tensor, *layers: SparseLayer) -> Tensor:
    """Outputs of layers in a row, exact to rounding, without gradients.

    Arguments:
        x: (…, in).
        layers: of which each takes the outputs of the one before.

    Returns: (…, out).

    Raises:
        ValueError: a layer has another number of inputs than it is given, or its weights are
            of other shapes than its coefficients say.
    """
    width = x.shape[-1]
    for layer in layers:
        inputs, functions, out = layer.coefficients.shape
        if width != inputs:
            raise ValueError(f"x has {width} channels: expected {inputs}")
        # sparse.cpp would read past their ends.
        if functions != layer.basis.num_functions:
            raise ValueError(
                f"coefficients of {functions} functions: the basis has {layer.basis.num_functions}"
            )
        if layer.base is not None and layer.base_weight is None:
            raise ValueError(f"base = {layer.base!r}: it has no weights")
        shapes = (inputs,), (inputs, functions, out), (out, inputs), (out,)
        for weight, shape in zip(layer.tensors, shapes, strict=True):
            if weight is not None and weight.shape != shape:
                raise ValueError(f"weights of shape {tuple(weight.shape)}: expected {shape}")
        width = out
    function = _native(x)
    if function is None:
        return functools.reduce(_torch_sums, layers, x)
    prepared = _prepare(x, layers)
    if prepared is None:
        return functools.reduce(_sums, layers, x)
    return _call(function, x, prepared)


class SparseReader:
    """`sparse_sums` of layers that belong to modules, which it knows again.

    Between two tokens weights have displaced all else in the caches, and asking every module for
    everything takes as long as many rows. So what sparse.cpp is told is kept until something in
    the modules is another object, or a tensor lies elsewhere or otherwise.
    """

    def __init__(self) -> None:
        self._known: _Known | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the modules lies elsewhere.
        return SparseReader, ()

    def __call__(
        self,
        x: Tensor,
        owners: tuple[nn.Module, ...],
        layers: Callable[[], Sequence[SparseLayer] | None],
    ) -> Tensor | None:
        """The sums of the layers, as of `sparse_sums`; None where there are none.

        Arguments:
            owners: from them and the modules in them the layers follow.
        """
        known = self._known
        if known is not None and known.owners == owners and known.holds(x):
            return _call(known.function, x, known.prepared)
        made = layers()
        if made is None:
            return None
        y = sparse_sums(x, *made)
        function = _native(x)
        prepared = None if function is None else _prepare(x, made)
        if function is not None and prepared is not None:
            known = _Known(x, function, prepared, owners)
            self._known = known if known.watches(made) else None
        return y


class _Known:
    """Layers as they are prepared for inputs like x, and the state of modules that this is of."""

    def __init__(
        self,
        x: Tensor,
        function: "ctypes._NamedFuncPointer",
        prepared: "_Prepared",
        owners: tuple[nn.Module, ...],
    ) -> None:
        self.owners = owners
        self.function = function
        self.prepared = prepared
        self.dtype = x.dtype
        #: By the dictionary that it stands in: names and numbers, submodules, and tensors.
        self.objects: list[tuple[dict[str, Any], str, Any]] = []
        self.tensors: list[tuple[dict[str, Any], str, Tensor, int, int, torch.dtype]] = []
        for module in (module for owner in owners for module in owner.modules()):
            own = module.__dict__
            names = (name for name in ("base", "epsilon", "equal_cells") if name in own)
            self.objects += [(own, name, own[name]) for name in names]
            self.objects += [(own["_modules"], *item) for item in own["_modules"].items()]
            for held in (own["_parameters"], own["_buffers"]):
                for name, tensor in held.items():
                    if tensor is None:
                        self.objects.append((held, name, None))
                    else:
                        place = tensor.data_ptr(), tensor.numel(), tensor.dtype
                        self.tensors.append((held, name, tensor, *place))

    def watches(self, layers: Sequence[SparseLayer]) -> bool:
        """Whether all that is read belongs to the modules. A tensor in an attribute may be another
        the next time, and one that is computed on access is free memory by then."""
        watched = {id(tensor) for _, _, tensor, *_ in self.tensors}
        read = (t for layer in layers for t in (*layer.tensors, _knots(layer.basis)))
        return all(t is None or id(t) in watched for t in read)

    def holds(self, x: Tensor) -> bool:
        """Whether nothing has changed, and x is alike."""
        if x.dtype != self.dtype or not x.is_cpu or not is_plain(x):
            return False
        if x.shape[-1] != self.prepared.inputs:
            return False
        for held, name, known in self.objects:
            if held.get(name) is not known:
                return False
        for held, name, known, place, size, dtype in self.tensors:
            if held.get(name) is not known or known.data_ptr() != place:
                return False
            # As where `data` was put in place of another.
            if known.numel() != size or known.dtype != dtype or not known.is_contiguous():
                return False
        return True


def _sums(x: Tensor, layer: SparseLayer) -> Tensor:
    """One layer, by sparse.cpp if its weights are plain, with values that the basis finds."""
    function = _native(x)
    fits = layer.basis.support <= MOST_FUNCTIONS
    fits = fits and all(weight is None or _plain(weight, x) for weight in layer.tensors)
    if function is None or not fits:
        return _torch_sums(x, layer)
    prepared = _prepare(x, (layer,))
    first, values = None, None
    if prepared is None:
        if layer.norm is not None:
            x, layer = _normed(x, *layer.norm), layer._replace(norm=None)
        first, values = layer.basis.active(x)
        first, values = first.contiguous(), values.float().contiguous()
        prepared = _Prepared((layer,))
    return _call(function, x, prepared, first, values)


def _call(
    function: "ctypes._NamedFuncPointer",
    x: Tensor,
    prepared: "_Prepared",
    first: Tensor | None = None,
    values: Tensor | None = None,
) -> Tensor:
    """Call sparse.cpp; with `first` and `values` of a basis that it does not know."""
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], prepared.out)
    done = function(
        prepared.layers,
        len(prepared.layers),
        x.data_ptr(),
        y.data_ptr(),
        _pointer(first),
        _pointer(values),
        x.numel() // prepared.inputs,
        torch.get_num_threads(),
    )
    if not done:
        raise MemoryError("no memory for the sums of so many tokens")
    return y


class _Layer(ctypes.Structure):
    """As `Layer` in sparse.cpp."""

    _fields_: ClassVar = [
        *[(name, ctypes.c_void_p) for name in ("norm", "coefficients", "base_weight", "bias")],
        ("knots", ctypes.c_void_p),
        *[
            (name, ctypes.c_int64)
            for name in ("inputs", "functions", "out", "support", "base_kind", "cells")
        ],
        ("epsilon", ctypes.c_float),
    ]


class _Prepared:
    """Layers as sparse.cpp takes them: where their tensors lie, not what is in them."""

    def __init__(self, layers: Sequence[SparseLayer]) -> None:
        self.inputs, self.out = layers[0].coefficients.shape[0], layers[-1].coefficients.shape[2]
        self.layers = (_Layer * len(layers))(*map(self._layer, layers))

    def _layer(self, layer: SparseLayer) -> _Layer:
        knots = _knots(layer.basis)
        return _Layer(
            *map(_pointer, layer.tensors),
            _pointer(knots),
            *layer.coefficients.shape,
            layer.basis.support,
            BASE_CODES[layer.base],
            0 if knots is None else layer.basis.num_functions - layer.basis.support + 1,
            0.0 if layer.norm is None else layer.norm[1],
        )


def _prepare(x: Tensor, layers: Sequence[SparseLayer]) -> _Prepared | None:
    """The layers for sparse.cpp; None if it cannot find all values by itself."""
    for layer in layers:
        if _knots(layer.basis) is None:
            return None
        if any(weight is not None and not _plain(weight, x) for weight in layer.tensors):
            return None
    return _Prepared(layers)


def _knots(basis: Local) -> Tensor | None:
    """Of a grid on which sparse.cpp finds the values: B-splines on equal cells for all inputs."""
    # A class of somebody else's may have other values.
    if type(basis) is not BSpline or not basis.equal_cells or len(basis.knots) != 1:
        return None
    if basis.degree == 0:
        # A step is on the other side of a knot already where the cell is off by rounding.
        return None
    return basis.knots if holds_floats(basis.knots) else None


def _torch_sums(x: Tensor, layer: SparseLayer) -> Tensor:
    """One layer by torch's own operators, on any device and in any dtype."""
    if layer.norm is not None:
        x = _normed(x, *layer.norm)
    coefficients = layer.coefficients
    inputs, functions, out = coefficients.shape
    first, values = layer.basis.active(x.reshape(-1, inputs))
    start = torch.arange(0, inputs * functions, functions, device=x.device)
    rows = (first + start).unsqueeze(-1) + torch.arange(layer.basis.support, device=x.device)
    sums = F.embedding_bag(
        rows.flatten(1),
        coefficients.reshape(-1, out),
        mode="sum",
        per_sample_weights=values.flatten(1).to(coefficients.dtype),
    )
    y = sums.view(*x.shape[:-1], out)
    if layer.base is not None:
        assert layer.base_weight is not None
        y = y + F.linear(BASE_FUNCTIONS[layer.base](x), layer.base_weight)
    return y if layer.bias is None else y + layer.bias


def _normed(x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    return F.rms_norm(x, gain.shape, gain, epsilon)


def _native(x: Tensor) -> "ctypes._NamedFuncPointer | None":
    """The function of sparse.cpp for inputs like x, or None."""
    if not is_plain(x) or x.device.type != "cpu" or x.dtype not in _NAMES:
        return None
    return _functions().get(x.dtype)


@functools.cache
def _functions() -> "dict[torch.dtype, ctypes._NamedFuncPointer]":
    library = load_library(Path(__file__).with_name("sparse.cpp"), *_NAMES.values())
    if library is None:
        return {}
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    functions = {dtype: getattr(library, name) for dtype, name in _NAMES.items()}
    for function in functions.values():
        function.argtypes = [pointer, count, *[pointer] * 4, count, count]
        function.restype = ctypes.c_bool
    return functions


def _plain(weight: Tensor, x: Tensor) -> bool:
    alike = weight.dtype == x.dtype and weight.device == x.device
    return alike and is_plain(weight) and weight.is_contiguous()


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
