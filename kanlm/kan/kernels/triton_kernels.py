"""Products of a basis that is evaluated in registers, by Triton; imported when first run.

Three kernels: the sums, the gradient of the inputs and that of the coefficients. In each, a
program owns one tile of the result, loads a tile of inputs once, and walks through the
functions of the basis, whose state (of a recurrence, or the place on a grid) stays in registers:
a product on tensor cores a function, accumulated in float32.

They run on every GPU that has tensor cores for these dtypes, and in Triton's interpreter;
`triton_hopper` has those for an H100, and `triton_launches` says which runs when, with what tiles.
"""

# Jitted functions are Python in form alone, and what they call raises outside of them.
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl
from triton import knobs

from .triton_formulas import step

#: Triton's interpreter, which runs kernels on a CPU for tests, multiplies the bits of bfloat16.
INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


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
def _now(numbers):
    """Float32 numbers, to be computed here: the compiler would put it off until after a loop, in
    which what they are computed of takes more registers than they do.
    """
    if INTERPRETED:
        return numbers
    else:  # noqa: RET505
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [numbers], dtype=tl.float32, is_pure=False, pack=1
        )


@triton.jit
def _place(index, rows, columns, GROUP: tl.constexpr):
    """Row and column of a program's tile: programs that run together share tiles in cache."""
    in_group = GROUP * columns
    first = index // in_group * GROUP
    height = min(rows - first, GROUP)
    return first + index % in_group % height, index % in_group // height


@triton.jit(do_not_specialize=["tokens", "size"])
def sums_kernel(
    x_ptr, c_ptr, places_ptr, y_ptr, tokens, size,
    INPUTS: tl.constexpr, FUNCTIONS: tl.constexpr, OUTPUTS: tl.constexpr,
    START: tl.constexpr, STEP: tl.constexpr, NUMBERS: tl.constexpr, BASE: tl.constexpr,
    PRECISION: tl.constexpr, TOGETHER: tl.constexpr,
    TOKENS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """y[n, o] = Σ_i Σ_b φ_b(x[n, i]) c[i, b, o], TOGETHER functions in a pass."""
    row, column = _place(tl.program_id(0), tl.cdiv(tokens, TOKENS), tl.cdiv(OUTPUTS, OUT), 8)
    n, i, o = tl.arange(0, TOKENS), tl.arange(0, IN), column * OUT + tl.arange(0, OUT)
    there, within = (row * TOKENS + n < tokens)[:, None], (o < OUTPUTS)[None, :]
    B: tl.constexpr = FUNCTIONS if BASE == "none" else FUNCTIONS - 1
    EVEN_IN: tl.constexpr = INPUTS % IN == 0
    EVEN_C: tl.constexpr = EVEN_IN and OUTPUTS % OUT == 0
    y = tl.zeros((TOKENS, OUT), tl.float32)
    for begin in tl.static_range(0, FUNCTIONS, TOGETHER):
        x_rows = x_ptr + (row * TOKENS).to(tl.int64) * INPUTS
        x_tile = x_rows + n[:, None] * INPUTS + i[None, :]
        c_tile = c_ptr + begin * OUTPUTS + i[:, None] * (FUNCTIONS * OUTPUTS) + o[None, :]
        for first in range(0, INPUTS, IN):
            known = (first + i < INPUTS)[None, :]
            x = _load(x_tile, there if EVEN_IN else there & known, False).to(tl.float32)
            state = START(x, places_ptr, B, NUMBERS)
            for b in tl.static_range(begin):
                _value, _slope, state = step(state, x, b, STEP, NUMBERS, FUNCTIONS, BASE)
            for j in tl.static_range(TOGETHER):
                if begin + j < FUNCTIONS:
                    # Zero beyond the inputs, where no function need be zero.
                    within_c = (first + i < INPUTS)[:, None] & within
                    c = _load(c_tile + j * OUTPUTS, within_c, EVEN_C)
                    value, _slope, state = step(state, x, begin + j, STEP, NUMBERS, FUNCTIONS, BASE)
                    y = _dot(value.to(c.dtype), c, y, PRECISION)
            x_tile += IN
            c_tile += IN * FUNCTIONS * OUTPUTS
    y_tile = y_ptr + (row * TOKENS).to(tl.int64) * OUTPUTS + n[:, None] * OUTPUTS + o[None, :]
    tl.store(y_tile, y.to(y_ptr.dtype.element_ty), mask=there & within)


@triton.jit(do_not_specialize=["tokens", "size"])
def input_gradients_kernel(
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
            _value, _slope, state = step(state, x, b, STEP, NUMBERS, FUNCTIONS, BASE)
        for j in tl.static_range(TOGETHER):
            if begin + j < FUNCTIONS:
                _value, slope, state = step(state, x, begin + j, STEP, NUMBERS, FUNCTIONS, BASE)
                dx += sums[j] * slope
        dx = _now(dx)
    tl.store(dx_ptr + x_tile, dx.to(dx_ptr.dtype.element_ty), mask=there & known[None, :])


@triton.jit(do_not_specialize=["tokens", "size", "tokens_each"])
def coefficient_gradients_kernel(
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
                _value, _slope, state = step(state, x, b, STEP, NUMBERS, FUNCTIONS, BASE)
            after = ()
            for j in tl.static_range(TOGETHER):
                if begin + j < FUNCTIONS:
                    value, _slope, state = step(state, x, begin + j, STEP, NUMBERS, FUNCTIONS, BASE)
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
