"""A layer's outputs for a few tokens, from those coefficients alone that play a part.

Decoding one token is bound by the bytes of weights that it reads. Of a local basis's B
functions only `support` differ from zero at an input, and the coefficients of neighbouring
functions lie side by side, so a token needs support / B of them, beside all weights of the base.

On a CPU with a C++ compiler, sparse.cpp reads them; elsewhere torch's `embedding_bag`, which adds
up weighted rows of a table.
"""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ..base_functions import BASE_FUNCTIONS, BaseFunction
from ..bases import BSpline, Local
from ..native import is_plain, load_library

#: Most tokens at a time for which reading rows was faster than dense products at every width
#: and grid tried (`kanlm bench decode`): with sparse.cpp, and with embedding_bag.
NATIVE_TOKENS, TORCH_TOKENS = 64, 4

_BASES = {None: 0, "silu": 1, "identity": 2}
_NAMES = {torch.float32: "sums_float32", torch.bfloat16: "sums_bfloat16"}


def most_tokens(x: Tensor) -> int:
    """How many tokens may be asked for at a time before dense products are faster."""
    return TORCH_TOKENS if _native(x) is None else NATIVE_TOKENS


def sparse_sums(
    x: Tensor,
    coefficients: Tensor,
    basis: Local,
    base: BaseFunction | None = None,
    base_weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: tuple[Tensor, float] | None = None,
) -> Tensor:
    """A layer's outputs, exact to rounding, without gradients.

    Arguments:
        x: (…, in).
        coefficients: (in, B, out).
        base: function beside the basis, with `base_weight` (out, in).
        bias: (out,).
        norm: gain (in,) and epsilon of an RMS norm that x goes through first.

    Returns: (…, out).
    """
    function = _native(x)
    weights = [coefficients, base_weight, bias, None if norm is None else norm[0]]
    if function is None or any(w is not None and not _plain(w, x) for w in weights):
        return _torch_sums(x, coefficients, basis, base, base_weight, bias, norm)
    inputs, functions, out = coefficients.shape
    tokens = x.numel() // inputs
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], out)
    threads = torch.get_num_threads()
    if isinstance(basis, BSpline) and basis.equal_cells and len(basis.knots) == 1:
        low, high, cells = *_range(basis), basis.grid_size
        first = torch.empty(tokens * inputs, dtype=torch.int64)
        values = torch.empty(tokens * inputs * basis.support)
    else:
        low, high, cells = 0.0, 0.0, 0
        if norm is not None:
            x, norm = _normed(x, *norm), None
        first, values = basis.active(x)
        first, values = first.contiguous(), values.float().contiguous()
    gain, epsilon = (None, 0.0) if norm is None else norm
    # Sums of different threads share no line of the cache.
    stride = -(-out // 16) * 16
    scratch = torch.empty(tokens * inputs + threads * tokens * stride)
    base_values = scratch.data_ptr()
    sums = base_values + 4 * tokens * inputs
    function(
        x.data_ptr(),
        _pointer(gain),
        coefficients.data_ptr(),
        _pointer(base_weight),
        _pointer(bias),
        y.data_ptr(),
        first.data_ptr(),
        values.data_ptr(),
        base_values,
        sums,
        tokens,
        inputs,
        functions,
        out,
        basis.support,
        _BASES[base],
        low,
        high,
        cells,
        epsilon,
        threads,
    )
    return y


def _torch_sums(
    x: Tensor,
    coefficients: Tensor,
    basis: Local,
    base: BaseFunction | None,
    base_weight: Tensor | None,
    bias: Tensor | None,
    norm: tuple[Tensor, float] | None,
) -> Tensor:
    """`sparse_sums` by torch's own operators, on any device and in any dtype."""
    if norm is not None:
        x = _normed(x, *norm)
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
    y = sums.view(*x.shape[:-1], out)
    if base is not None:
        assert base_weight is not None
        y = y + F.linear(BASE_FUNCTIONS[base](x), base_weight)
    return y if bias is None else y + bias


def _normed(x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    return F.rms_norm(x, gain.shape, gain, epsilon)


def _native(x: Tensor) -> "ctypes._NamedFuncPointer | None":
    """The function of sparse.cpp for inputs like x, or None."""
    if not is_plain(x) or x.device.type != "cpu" or x.dtype not in _NAMES:
        return None
    return _functions().get(x.dtype)


@functools.cache
def _functions() -> "dict[torch.dtype, ctypes._NamedFuncPointer]":
    library = load_library(Path(__file__).with_name("sparse.cpp"))
    if library is None:
        return {}
    pointer, count, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    functions = {dtype: getattr(library, name) for dtype, name in _NAMES.items()}
    for function in functions.values():
        function.argtypes = [*[pointer] * 10, *[count] * 6, number, number, count, number, count]
        function.restype = None
    return functions


def _range(basis: BSpline) -> tuple[float, float]:
    low, high = basis.ends[0].tolist()
    return low, high


def _plain(weight: Tensor, x: Tensor) -> bool:
    alike = weight.dtype == x.dtype and weight.device == x.device
    return alike and is_plain(weight) and weight.is_contiguous()


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
