"""Products of a basis that is evaluated in registers, by Triton; imported when first run.

Three kernels: the sums, the gradient of the inputs and that of the coefficients. In each, a
program owns one tile of the result, loads a tile of inputs once, and walks through the
functions of the basis, whose state (of a recurrence, or the cell on a grid) stays in registers:
a product on tensor cores a function, accumulated in float32.

A basis is two jitted functions, in FORMULAS by name:

- start(x, places, B, NUMBERS) → state, for x a tile in float32;
- step(state, b, NUMBERS) → value, slope, state, asked for b = 0, 1, … in turn.

`places` points to a tensor that may change while the model trains, NUMBERS are compiled in, B
and b are known to the compiler. Whichever of value and slope a kernel leaves unread costs nothing.

What the tiles are chosen by, for an H100, which multiplies 2,048 pairs a cycle in each of its
132 processors and evaluates 128 float32 operations, 16 of them exponentials or reciprocals:

- The basis is evaluated again for every tile of outputs. Hermite 3 after tanh takes some 15
  operations an input, beside 3 products an output: wide tiles of outputs make that little. The
  gradient of the inputs evaluates it once, at the end.
- An accumulator of 128 × 256 fills half of the registers of 8 warps. The gradients keep one
  accumulator a function, so that a tile of dy is read once for several, and tiles are the
  narrower the more functions go together; more than fit take several passes.
- Loads for coming turns of the loop wait in shared memory, of which there are 227 KiB.
"""

# Jitted functions are Python in form alone, and what they call raises outside of them.
# pyright: reportGeneralTypeIssues=false

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

#: Triton's interpreter, which runs kernels on a CPU for tests, multiplies the bits of bfloat16.
INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


# Bases


@triton.jit
def _start_polynomials(x, places, B: tl.constexpr, NUMBERS: tl.constexpr):
    """NUMBERS: half-width, whether to squash, whether there is a constant, a_0, c_0, a_1, …
    of p_{n+1} = a_n x p_n − c_n p_{n−1} with p_0 = 1 and p_{−1} = 0.
    """
    half_width: tl.constexpr = NUMBERS[0]
    if NUMBERS[1] > 0:
        bent = 1 - 2 / (1 + tl.exp(x * (2 / half_width)))  # tanh
        inside = half_width * bent
        bend = 1 - bent * bent
        tail = tl.zeros_like(x)
    else:
        # Comparisons, so that NaN stays what it is.
        inside = tl.where(x > half_width, half_width, tl.where(x < -half_width, -half_width, x))
        bend = tl.full(x.shape, 1.0, tl.float32)
        tail = x - inside
    zero, one = tl.zeros_like(x), tl.full(x.shape, 1.0, tl.float32)
    return inside, bend, tail, zero, one, zero, zero


@triton.jit
def _step_polynomials(state, b: tl.constexpr, NUMBERS: tl.constexpr):
    inside, bend, tail, before, value, slope_before, slope = state
    if b > 0 or NUMBERS[2] == 0:
        n: tl.constexpr = b - 1 if NUMBERS[2] > 0 else b
        a: tl.constexpr = NUMBERS[3 + 2 * n]
        c: tl.constexpr = NUMBERS[4 + 2 * n]
        after = a * inside * value
        slope_after = a * (value + inside * slope)
        if n > 0:
            after -= c * before
            slope_after -= c * slope_before
        before, value = value, after
        slope_before, slope = slope, slope_after
    result = value if NUMBERS[1] > 0 else value + slope * tail
    return result, slope * bend, (inside, bend, tail, before, value, slope_before, slope)


@triton.jit
def _start_hats(x, places, B: tl.constexpr, NUMBERS: tl.constexpr):
    """`places` has the B knots, of which the ends say all; NUMBERS none."""
    cells: tl.constexpr = B - 1
    low, high = tl.load(places).to(tl.float32), tl.load(places + cells).to(tl.float32)
    per_unit = cells / (high - low)
    position = (x - low) * per_unit
    # The outer cells own the tails. NaN is in the first, and stays what it is.
    cell = tl.where(position < cells - 1, tl.floor(position), cells - 1)
    cell = tl.where(position >= 1, cell, 0)
    return cell, position - cell, per_unit


@triton.jit
def _step_hats(state, b: tl.constexpr, NUMBERS: tl.constexpr):
    cell, position, per_unit = state
    falling, rising = cell == b, cell == b - 1
    value = tl.where(falling, 1 - position, tl.where(rising, position, 0.0))
    slope = tl.where(falling, -per_unit, tl.where(rising, per_unit, 0.0))
    return value, slope, state


#: (start, step) of the bases that have a formula, by the names that `fused` knows them by.
FORMULAS: dict[str, tuple[Any, Any]] = {
    "polynomials": (_start_polynomials, _step_polynomials),
    "hats": (_start_hats, _step_hats),
}


@triton.jit
def _step(
    state, x, b: tl.constexpr, STEP: tl.constexpr, NUMBERS: tl.constexpr,
    FUNCTIONS: tl.constexpr, BASE: tl.constexpr,
):  # fmt: skip
    """A step of the basis; the base function, where there is one, is the last of FUNCTIONS."""
    if b == FUNCTIONS - 1 and BASE == "silu":
        share = 1 / (1 + tl.exp(-x))
        value, slope = x * share, share * (1 + x * (1 - share))
    elif b == FUNCTIONS - 1 and BASE == "identity":
        value, slope = x, tl.full(x.shape, 1.0, tl.float32)
    else:
        value, slope, state = STEP(state, b, NUMBERS)
    return value, slope, state


# Kernels. Pointers are to contiguous tensors: x and dx (tokens, INPUTS), c (INPUTS, FUNCTIONS,
# OUTPUTS), y and dy (tokens, OUTPUTS). Products are in the dtype of c.


@triton.jit
def _dot(a, b, sums, PRECISION: tl.constexpr):
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision=PRECISION)


@triton.jit
def _load(pointers, mask, EVEN: tl.constexpr):
    # Without a mask where tiles fill the tensor: one would be computed in every turn of a loop.
    return tl.load(pointers) if EVEN else tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def _place(index, rows, columns, GROUP: tl.constexpr):
    """Row and column of a program's tile: programs that run together share tiles in cache."""
    in_group = GROUP * columns
    first = index // in_group * GROUP
    height = min(rows - first, GROUP)
    return first + index % in_group % height, index % in_group // height


@triton.jit(do_not_specialize=["tokens", "size"])
def _sums_kernel(
    x_ptr, c_ptr, places_ptr, y_ptr, tokens, size,
    INPUTS: tl.constexpr, FUNCTIONS: tl.constexpr, OUTPUTS: tl.constexpr,
    START: tl.constexpr, STEP: tl.constexpr, NUMBERS: tl.constexpr, BASE: tl.constexpr,
    PRECISION: tl.constexpr, TOKENS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """y[n, o] = Σ_i Σ_b φ_b(x[n, i]) c[i, b, o]."""
    row, column = _place(tl.program_id(0), tl.cdiv(tokens, TOKENS), tl.cdiv(OUTPUTS, OUT), 8)
    n, i, o = tl.arange(0, TOKENS), tl.arange(0, IN), column * OUT + tl.arange(0, OUT)
    there, within = (row * TOKENS + n < tokens)[:, None], (o < OUTPUTS)[None, :]
    x_tile = x_ptr + (row * TOKENS).to(tl.int64) * INPUTS + n[:, None] * INPUTS + i[None, :]
    c_tile = c_ptr + i[:, None] * (FUNCTIONS * OUTPUTS) + o[None, :]
    B: tl.constexpr = FUNCTIONS if BASE == "none" else FUNCTIONS - 1
    EVEN_IN: tl.constexpr = INPUTS % IN == 0
    EVEN_C: tl.constexpr = EVEN_IN and OUTPUTS % OUT == 0
    y = tl.zeros((TOKENS, OUT), tl.float32)
    for first in range(0, INPUTS, IN):
        known = (first + i < INPUTS)[None, :]
        x = _load(x_tile, there if EVEN_IN else there & known, False).to(tl.float32)
        state = START(x, places_ptr, B, NUMBERS)
        for b in tl.static_range(FUNCTIONS):
            # Zero beyond the inputs, where no function need be zero.
            c = _load(c_tile + b * OUTPUTS, (first + i < INPUTS)[:, None] & within, EVEN_C)
            value, _slope, state = _step(state, x, b, STEP, NUMBERS, FUNCTIONS, BASE)
            y = _dot(value.to(c.dtype), c, y, PRECISION)
        x_tile += IN
        c_tile += IN * FUNCTIONS * OUTPUTS
    y_tile = y_ptr + (row * TOKENS).to(tl.int64) * OUTPUTS + n[:, None] * OUTPUTS + o[None, :]
    tl.store(y_tile, y.to(y_ptr.dtype.element_ty), mask=there & within)


@triton.jit(do_not_specialize=["tokens", "size"])
def _input_gradients_kernel(
    dy_ptr, x_ptr, c_ptr, places_ptr, dx_ptr, tokens, size,
    INPUTS: tl.constexpr, FUNCTIONS: tl.constexpr, OUTPUTS: tl.constexpr,
    START: tl.constexpr, STEP: tl.constexpr, NUMBERS: tl.constexpr, BASE: tl.constexpr,
    PRECISION: tl.constexpr, TOGETHER: tl.constexpr,
    TOKENS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """dx[n, i] = Σ_b φ_b′(x[n, i]) Σ_o dy[n, o] c[i, b, o], TOGETHER functions in a pass."""
    row, column = _place(tl.program_id(0), tl.cdiv(tokens, TOKENS), tl.cdiv(INPUTS, IN), 8)
    n, i, o = tl.arange(0, TOKENS), column * IN + tl.arange(0, IN), tl.arange(0, OUT)
    there, known = (row * TOKENS + n < tokens)[:, None], i < INPUTS
    start = (row * TOKENS).to(tl.int64)
    x_tile = start * INPUTS + n[:, None] * INPUTS + i[None, :]
    B: tl.constexpr = FUNCTIONS if BASE == "none" else FUNCTIONS - 1
    EVEN_OUT: tl.constexpr = OUTPUTS % OUT == 0
    EVEN_C: tl.constexpr = EVEN_OUT and INPUTS % IN == 0
    dx = tl.zeros((TOKENS, IN), tl.float32)
    for begin in tl.static_range(0, FUNCTIONS, TOGETHER):
        dy_tile = dy_ptr + start * OUTPUTS + n[:, None] * OUTPUTS + o[None, :]
        # The first row of coefficients may lie beyond 2³¹ numbers.
        rows = (column * IN).to(tl.int64) * (FUNCTIONS * OUTPUTS)
        local = tl.arange(0, IN)[:, None] * (FUNCTIONS * OUTPUTS) + o[None, :]
        c_tile = c_ptr + rows + local + begin * OUTPUTS
        sums = ()
        for _ in tl.static_range(TOGETHER):
            sums = sums + (tl.zeros((TOKENS, IN), tl.float32),)  # noqa: RUF005
        for first in range(0, OUTPUTS, OUT):
            within = (first + o < OUTPUTS)[None, :]
            dy = _load(dy_tile, there if EVEN_OUT else there & within, False)
            after = ()
            for j in tl.static_range(TOGETHER):
                if begin + j < FUNCTIONS:
                    c = _load(c_tile + j * OUTPUTS, known[:, None] & within, EVEN_C)
                    after = after + (_dot(dy, tl.trans(c), sums[j], PRECISION),)  # noqa: RUF005
                else:
                    after = after + (sums[j],)  # noqa: RUF005
            sums = after
            dy_tile += OUT
            c_tile += OUT
        # Only now, or the state would take registers from the loop.
        x = tl.load(x_ptr + x_tile, mask=there & known[None, :], other=0.0).to(tl.float32)
        state = START(x, places_ptr, B, NUMBERS)
        for b in tl.static_range(begin):
            _value, _slope, state = _step(state, x, b, STEP, NUMBERS, FUNCTIONS, BASE)
        for j in tl.static_range(TOGETHER):
            if begin + j < FUNCTIONS:
                _value, slope, state = _step(state, x, begin + j, STEP, NUMBERS, FUNCTIONS, BASE)
                dx += sums[j] * slope
    tl.store(dx_ptr + x_tile, dx.to(dx_ptr.dtype.element_ty), mask=there & known[None, :])


@triton.jit(do_not_specialize=["tokens", "size", "tokens_each"])
def _coefficient_gradients_kernel(
    dy_ptr, x_ptr, places_ptr, dc_ptr, tokens, size, tokens_each,
    INPUTS: tl.constexpr, FUNCTIONS: tl.constexpr, OUTPUTS: tl.constexpr,
    START: tl.constexpr, STEP: tl.constexpr, NUMBERS: tl.constexpr, BASE: tl.constexpr,
    PRECISION: tl.constexpr, EVEN_TOKENS: tl.constexpr, TOGETHER: tl.constexpr,
    TOKENS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """dc[s, i, b, o] = Σ_n φ_b(x[n, i]) dy[n, o] over the s-th part of the tokens, which has
    tokens_each; TOGETHER functions in a pass.
    """
    row, column = _place(tl.program_id(0), tl.cdiv(INPUTS, IN), tl.cdiv(OUTPUTS, OUT), 8)
    left = min(tokens - tl.program_id(1) * tokens_each, tokens_each)
    part = tl.program_id(1).to(tl.int64)
    n, i, o = tl.arange(0, TOKENS), row * IN + tl.arange(0, IN), column * OUT + tl.arange(0, OUT)
    known, within = i < INPUTS, (o < OUTPUTS)[None, :]
    B: tl.constexpr = FUNCTIONS if BASE == "none" else FUNCTIONS - 1
    EVEN_X: tl.constexpr = EVEN_TOKENS and INPUTS % IN == 0
    EVEN_DY: tl.constexpr = EVEN_TOKENS and OUTPUTS % OUT == 0
    dc_rows = dc_ptr + (part * INPUTS + row * IN) * (FUNCTIONS * OUTPUTS)
    dc_tile = dc_rows + tl.arange(0, IN)[:, None] * (FUNCTIONS * OUTPUTS) + o[None, :]
    for begin in tl.static_range(0, FUNCTIONS, TOGETHER):
        x_tile = x_ptr + part * tokens_each * INPUTS + n[:, None] * INPUTS + i[None, :]
        dy_tile = dy_ptr + part * tokens_each * OUTPUTS + n[:, None] * OUTPUTS + o[None, :]
        sums = ()
        for _ in tl.static_range(TOGETHER):
            sums = sums + (tl.zeros((IN, OUT), tl.float32),)  # noqa: RUF005
        for first in range(0, left, TOKENS):
            there = (first + n < left)[:, None]
            x = _load(x_tile, there & known[None, :], EVEN_X).to(tl.float32)
            # Zero beyond the tokens, where no function need be zero.
            dy = _load(dy_tile, there & within, EVEN_DY)
            state = START(x, places_ptr, B, NUMBERS)
            for b in tl.static_range(begin):
                _value, _slope, state = _step(state, x, b, STEP, NUMBERS, FUNCTIONS, BASE)
            after = ()
            for j in tl.static_range(TOGETHER):
                if begin + j < FUNCTIONS:
                    value, _slope, state = _step(
                        state, x, begin + j, STEP, NUMBERS, FUNCTIONS, BASE
                    )
                    turned = tl.trans(value.to(dy.dtype))
                    after = after + (_dot(turned, dy, sums[j], PRECISION),)  # noqa: RUF005
                else:
                    after = after + (sums[j],)  # noqa: RUF005
            sums = after
            x_tile += TOKENS * INPUTS
            dy_tile += TOKENS * OUTPUTS
        for j in tl.static_range(TOGETHER):
            if begin + j < FUNCTIONS:
                tl.store(
                    dc_tile + (begin + j) * OUTPUTS,
                    sums[j].to(dc_ptr.dtype.element_ty),
                    mask=known[:, None] & within,
                )


# Tiles


#: Numbers that the accumulators of 8 warps may hold together, 128 registers a thread.
_ACCUMULATORS = 128 * 256
#: Bytes of shared memory of an H100, less what the compiler needs for itself.
_SHARED = 208 * 1024
#: Programs a processor should have to itself, so that the last round is no large part.
_ROUNDS = 4
#: Tokens that make one more part of a sum over tokens worth adding up.
_LEAST_TOKENS = 2048


def _config(warps: int, stages: int, **sizes: int) -> triton.Config:
    return triton.Config(sizes, num_warps=warps, num_stages=stages)


def _sums_configs(functions: int, size: int) -> list[triton.Config]:
    """Of numbers of `size` bytes. The last takes little shared memory, however many functions."""
    configs = []
    for tokens, out, warps in ((128, 256, 8), (128, 128, 8), (64, 256, 4), (64, 128, 4)):
        for stages in (2, 3):
            # Inputs may be float32 whatever the products are in.
            inputs = _SHARED // (stages * (functions * out * size + tokens * 4))
            if inputs >= 16:
                sizes = {"TOKENS": tokens, "IN": _power_of_two(inputs, 64), "OUT": out}
                configs.append(_config(warps, stages, **sizes))
    return [*configs, _config(4, 1, TOKENS=64, IN=32, OUT=64)]


def _input_gradients_configs(functions: int, size: int) -> list[triton.Config]:
    configs = []
    for together in _passes(functions):
        columns = _power_of_two(_ACCUMULATORS // (128 * together), 128)
        sizes = {"TOGETHER": together, "IN": columns}
        configs += [
            _config(8, 3, TOKENS=128, OUT=128 // size, **sizes),
            _config(8, 4, TOKENS=128, OUT=64 // size, **sizes),
            _config(4, 3, TOKENS=64, OUT=128 // size, **sizes),
        ]
    return [*configs, _config(4, 1, TOGETHER=1, TOKENS=64, IN=64, OUT=32)]


def _coefficient_gradients_configs(functions: int, size: int) -> list[triton.Config]:
    configs = []
    for together in _passes(functions):
        # A tensor core's product has at least 64 rows, here of inputs.
        columns = _power_of_two(_ACCUMULATORS // (64 * together), 256)
        sizes = {"TOGETHER": together, "IN": 64}
        configs += [
            _config(8, 3, TOKENS=128 // size, OUT=columns, **sizes),
            _config(8, 4, TOKENS=64 // size, OUT=columns, **sizes),
            _config(4, 3, TOKENS=128 // size, OUT=max(columns // 2, 16), **sizes),
        ]
    return [*configs, _config(4, 1, TOGETHER=1, TOKENS=32, IN=64, OUT=64)]


#: Where float32 is multiplied as such, by the ordinary cores: large tiles take minutes to
#: compile.
_EXACT = {"TOGETHER": 1, "TOKENS": 32, "IN": 32, "OUT": 32}
#: Two functions in a pass, so that tests see several passes.
_SMALLEST = {"TOGETHER": 2, "TOKENS": 16, "IN": 16, "OUT": 16}


def _passes(functions: int) -> list[int]:
    """How many functions to take together: as few passes as 8 allow, or twice as many."""
    fewest = _count(functions, 8)
    passes = [fewest] if functions <= 4 else [fewest, 2 * fewest]
    return [_count(functions, each) for each in passes]


def _power_of_two(most: int, limit: int) -> int:
    """The largest that is neither above `most` nor `limit`, and at least 16."""
    return max(16, 1 << (min(most, limit).bit_length() - 1))


@functools.cache
def _tuned(kernel: Any, configs: Callable[..., list[Any]], functions: int, products: Any) -> Any:
    """The kernel, which measures its configurations when it first sees a size and keeps the
    result in Triton's cache, also for processes to come.
    """
    if INTERPRETED or products == "exact":
        sizes = _SMALLEST if INTERPRETED else _EXACT
        known = {name: size for name, size in sizes.items() if name in kernel.arg_names}
        choices = [_config(4, 1, **known)]
    else:
        choices = configs(functions, products.itemsize)
    key = ["size", "INPUTS", "OUTPUTS", "BASE"]
    return triton.autotune(choices, key=key, cache_results=True)(kernel)


# Calls


def sums(
    x: Tensor, c: Tensor, formula: str, numbers: tuple[float, ...], places: Tensor | None, base: str
) -> Tensor:
    """y of x (tokens, in) and c (in, B, out), both contiguous, in the dtype of c.

    Arguments:
        formula, numbers, places: of the basis.
        base: the function that the last of B is, `silu`, `identity` or `none`.
    """
    (tokens, inputs), (_, functions, outputs) = x.shape, c.shape
    y = x.new_empty(tokens, outputs, dtype=c.dtype)
    kernel = _tuned(_sums_kernel, _sums_configs, functions, _products(c.dtype))
    _launch(
        kernel,
        lambda meta: (_count(tokens, meta["TOKENS"]) * _count(outputs, meta["OUT"]),),
        (x, c, places, y, tokens, _size(tokens)),
        (inputs, functions, outputs),
        (formula, numbers, base),
        c.dtype,
    )
    return y


def input_gradients(
    dy: Tensor,
    x: Tensor,
    c: Tensor,
    formula: str,
    numbers: tuple[float, ...],
    places: Tensor | None,
    base: str,
) -> Tensor:
    """dx in the dtype of x, for dy (tokens, out) in the dtype of c; the rest as of `sums`."""
    (tokens, inputs), (_, functions, outputs) = x.shape, c.shape
    dx = torch.empty_like(x)
    kernel = _tuned(
        _input_gradients_kernel, _input_gradients_configs, functions, _products(c.dtype)
    )
    _launch(
        kernel,
        lambda meta: (_count(tokens, meta["TOKENS"]) * _count(inputs, meta["IN"]),),
        (dy, x, c, places, dx, tokens, _size(tokens)),
        (inputs, functions, outputs),
        (formula, numbers, base),
        c.dtype,
    )
    return dx


def coefficient_gradients(
    dy: Tensor,
    x: Tensor,
    functions: int,
    formula: str,
    numbers: tuple[float, ...],
    places: Tensor | None,
    base: str,
) -> Tensor:
    """dc (in, B, out) in float32, for dy (tokens, out); the rest as of `sums`.

    Sums over few tiles of many tokens are split into parts, whose sum does not depend on
    which was ready first.
    """
    (tokens, inputs), outputs = x.shape, dy.shape[1]
    parts = _parts(tokens, inputs * functions * outputs, x.device)
    # A multiple of every tile of tokens.
    tokens_each = 128 * _count(_count(tokens, parts), 128)
    parts = _count(tokens, tokens_each)
    dc = x.new_empty(parts, inputs, functions, outputs, dtype=torch.float32)
    kernel = _tuned(
        _coefficient_gradients_kernel,
        _coefficient_gradients_configs,
        functions,
        _products(dy.dtype),
    )
    _launch(
        kernel,
        lambda meta: (_count(inputs, meta["IN"]) * _count(outputs, meta["OUT"]), parts),
        (dy, x, places, dc, tokens, _size(tokens), tokens_each),
        (inputs, functions, outputs),
        (formula, numbers, base),
        dy.dtype,
        EVEN_TOKENS=tokens % tokens_each == 0,
    )
    return dc[0] if parts == 1 else dc.sum(dim=0)


def _launch(
    kernel: Any,
    grid: Callable[[dict[str, int]], tuple[int, ...]],
    arguments: tuple[Any, ...],
    shape: tuple[int, int, int],
    basis: tuple[str, tuple[float, ...], str],
    dtype: torch.dtype,
    **options: Any,
) -> None:
    formula, numbers, base = basis
    start, step = FORMULAS[formula]
    device = arguments[0].device
    constants = dict(zip(("INPUTS", "FUNCTIONS", "OUTPUTS"), shape, strict=True))
    with torch.cuda.device(device if device.type == "cuda" else -1):
        kernel[grid](
            *arguments,
            **constants,
            START=start,
            STEP=step,
            NUMBERS=numbers,
            BASE=base,
            PRECISION="ieee" if _products(dtype) == "exact" else "tf32",
            **options,
        )


def _parts(tokens: int, coefficients: int, device: torch.device) -> int:
    """Parts of a sum over tokens that give every processor work."""
    processors = 1
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    tiles = _count(coefficients, _ACCUMULATORS)
    return max(1, min(_count(_ROUNDS * processors, tiles), tokens // _LEAST_TOKENS))


def _products(dtype: torch.dtype) -> torch.dtype | Literal["exact"]:
    """Numbers that are multiplied: `exact` for float32 as it is, as in torch unless it is told."""
    exact = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"
    return "exact" if exact else dtype


def _size(tokens: int) -> int:
    """What tiles are chosen by: the power of two, up to where more of them changes nothing."""
    return min(tokens.bit_length(), 14)


def _count(length: int, size: int) -> int:
    return -(-length // size)
