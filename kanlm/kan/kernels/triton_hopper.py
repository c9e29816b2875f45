"""The kernels of `triton_kernels` for GPUs of compute capability 9.0, as of an H100, in Gluon.

There a product runs beside other instructions (wgmma), and all the time that the basis takes
can hide behind it. Triton itself does not get that far: what it multiplies from registers that
a loop computes it waits for at once (rule 1a of its WGMMAPipeline.cpp). Gluon, Triton's language
for those who say where things lie and when they are waited for, does:

    start the product with φ, which is in registers, and a tile that waits in shared memory
    wait until the product before it is done
    start copying the tile for the turn AHEAD turns on
    evaluate the next φ

So the cores always have a product in hand while the next φ is evaluated, and neither its
registers nor a tile in shared memory are written before what reads them is done: a tile is
overwritten two turns after its product, whose end all warps have seen at a barrier between.

An estimate, from instructions counted in the inner loops that Triton 3.7.1 makes for bfloat16
(every processor issues 4 a cycle, and multiplies 2,048 pairs): beside the cycles of its products
the sums take 0.7 times as many for Hermite 3, 0.5 for linear and 1.0 for cubic B-splines, so that
they should come to 0.75 to 0.85 of cuBLAS; so should the gradient of the inputs for up to four
functions, and about 0.6 for more, whose smaller tiles wait for memory. The gradient of the
coefficients evaluates the basis for every 64 to 128 outputs anew: 2 to 4 times as many, and 0.3
to 0.5 of cuBLAS. To do better, it has to read an expansion that is evaluated once.

Rows are a multiple of 16 bytes, which is what a thread copies: `fits`. Tiles beyond the ends are
filled with zeros, as copies with a mask are. wgmma reads tiles of bfloat16 and float16 along
either side, but TF32 only along the sums: there c and dy, which lie the other way, are laid
out anew before (`across`), and the gradient of the inputs is left to Triton, whose products of
two tiles in shared memory go on as these do.
"""

# Jitted functions are Python in form alone, and what they call raises outside of them.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .triton_formulas import step


def fits(kernel: str, x: Tensor, dtype: torch.dtype, outputs: int) -> bool:
    """Whether there is a kernel of this name for inputs x and products in a dtype."""
    if dtype == torch.float32 and kernel == "input_gradients":
        return False
    return x.shape[1] * x.element_size() % 16 == 0 and outputs * dtype.itemsize % 16 == 0


def across(c_or_dy: Tensor) -> Tensor:
    """c as (B, out, in), or dy as (out, tokens): what TF32 is multiplied by. Rows of the latter
    end with zeros, to a multiple of 16 numbers.
    """
    if c_or_dy.ndim == 3:
        return c_or_dy.permute(1, 2, 0).contiguous()
    tokens, outputs = c_or_dy.shape
    turned = c_or_dy.new_zeros(outputs, -(-tokens // 16) * 16)
    turned[:, :tokens] = c_or_dy.T
    return turned


# Tiles in shared memory


@gluon.constexpr_function
def _copied(columns, dtype, warps):
    """The layout in which a tile is copied: 16 bytes a thread, whole rows if they fit a warp."""
    each = 128 // dtype.primitive_bitwidth
    across = min(columns // each, 32)
    return gl.BlockedLayout([1, each], [32 // across, across], [warps, 1], [1, 0])


@gluon.constexpr_function
def _product(columns, warps, dtype):
    """The layout of a product with so many columns: 64 rows for every four warps."""
    each = 256 // dtype.primitive_bitwidth
    return gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, columns, each])


@gluon.constexpr_function
def _values(product, dtype):
    """The layout of what a product takes from registers."""
    return gl.DotOperandLayout(0, product, 32 // dtype.primitive_bitwidth)


@gluon.jit
def _ring(like, SLOTS: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """Shared memory for SLOTS tiles of the tensor that a pointer is to."""
    dtype: gl.constexpr = like.dtype.element_ty
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, COLUMNS], dtype)
    return gl.allocate_shared_memory(dtype, [SLOTS, ROWS, COLUMNS], layout)


@gluon.jit
def _copy(tile, pointer, stride, rows, columns):
    """Start to copy the tile that begins at a pointer, of which so many rows and columns exist."""
    ROWS: gl.constexpr = tile.shape[0]
    COLUMNS: gl.constexpr = tile.shape[1]
    layout: gl.constexpr = _copied(COLUMNS, pointer.dtype.element_ty, gl.num_warps())
    row = gl.arange(0, ROWS, gl.SliceLayout(1, layout))[:, None]
    column = gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))[None, :]
    async_copy.async_copy_global_to_shared(
        tile, pointer + row * stride + column, mask=(row < rows) & (column < columns)
    )


@gluon.jit
def _next(slot, SLOTS: gl.constexpr):
    return gl.where(slot + 1 == SLOTS, 0, slot + 1)


@gluon.jit
def _place(index, rows, columns, GROUP: gl.constexpr):
    """Row and column of a program's tile: programs that run together share tiles in cache."""
    in_group = GROUP * columns
    first = index // in_group * GROUP
    height = gl.minimum(rows - first, GROUP)
    return first + index % in_group % height, index % in_group // height


@gluon.jit
def _wait(pending: gl.constexpr, sums):
    """The sums, once no more products than `pending` are going on."""
    if len(sums) == 1:
        return (warpgroup_mma_wait(pending, deps=sums),)
    else:  # noqa: RET505
        return warpgroup_mma_wait(pending, deps=sums)


@gluon.jit
def _now(numbers):
    """Float32 numbers, to be computed here: the compiler would put it off until after a loop, in
    which what they are computed of takes more registers than they do.
    """
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [numbers], dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def _operand(value, dtype: gl.constexpr):
    """Values as products take them. Float32 is rounded to TF32 here: wgmma cuts the digits off,
    and could not go on while the number itself is in use.
    """
    if dtype == gl.float32:
        return gl.inline_asm_elementwise(
            "cvt.rna.tf32.f32 $0, $1;", "=r,r", [value], dtype=gl.float32, is_pure=True, pack=1
        )
    else:  # noqa: RET505
        return value.to(dtype)


# Kernels, whose arguments are those of `triton_kernels`


@gluon.jit
def _copy_for_sums(
    x_ring, c_ring, x_row, c_row, first, left, width, slot, s: gl.constexpr,
    INPUTS: gl.constexpr, FUNCTIONS: gl.constexpr, OUTPUTS: gl.constexpr, ACROSS: gl.constexpr,
):  # fmt: skip
    """Copy what the s-th turn after the slice at `first` reads, and the next slice of x."""
    slices: gl.constexpr = s // FUNCTIONS
    b: gl.constexpr = s % FUNCTIONS
    IN: gl.constexpr = x_ring.shape[2]
    there = INPUTS - first - slices * IN
    if ACROSS:
        c = c_row + slices * IN + b * (OUTPUTS * INPUTS)
        _copy(c_ring.index(slot), c, INPUTS, width, there)
    else:
        c = c_row + slices * (IN * FUNCTIONS * OUTPUTS) + b * OUTPUTS
        _copy(c_ring.index(slot), c, FUNCTIONS * OUTPUTS, there, width)
    if b == FUNCTIONS - 1:
        ahead = first // IN + slices + 1
        tile = x_ring.index(ahead % x_ring.shape[0])
        _copy(tile, x_row + (slices + 1) * IN, INPUTS, left, there - IN)
    async_copy.commit_group()


@gluon.jit(do_not_specialize=["tokens", "size"])
def sums_kernel(
    x_ptr, c_ptr, places_ptr, y_ptr, tokens, size,
    INPUTS: gl.constexpr, FUNCTIONS: gl.constexpr, OUTPUTS: gl.constexpr,
    START: gl.constexpr, STEP: gl.constexpr, NUMBERS: gl.constexpr, BASE: gl.constexpr,
    TOKENS: gl.constexpr, IN: gl.constexpr, OUT: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """y[n, o] = Σ_i Σ_b φ_b(x[n, i]) c[i, b, o]; c is `across` in float32."""
    row, column = _place(gl.program_id(0), gl.cdiv(tokens, TOKENS), gl.cdiv(OUTPUTS, OUT), 8)
    dtype: gl.constexpr = c_ptr.dtype.element_ty
    product: gl.constexpr = _product(OUT, gl.num_warps(), dtype)
    values: gl.constexpr = _values(product, dtype)
    ACROSS: gl.constexpr = dtype == gl.float32
    B: gl.constexpr = FUNCTIONS if BASE == "none" else FUNCTIONS - 1
    SLOTS: gl.constexpr = AHEAD + 2
    # A slice of x is copied with the last function of the one before.
    SLICES: gl.constexpr = (FUNCTIONS - 1 + AHEAD) // FUNCTIONS + 2
    x_ring = _ring(x_ptr, SLICES, TOKENS, IN)
    c_ring = _ring(c_ptr, SLOTS, OUT if ACROSS else IN, IN if ACROSS else OUT)
    left, width = tokens - row * TOKENS, OUTPUTS - column * OUT
    x_row = x_ptr + row.to(gl.int64) * (TOKENS * INPUTS)
    c_row = c_ptr + column * (OUT * INPUTS if ACROSS else OUT)
    _copy(x_ring.index(0), x_row, INPUTS, left, INPUTS)
    for s in gl.static_range(AHEAD):
        _copy_for_sums(
            x_ring, c_ring, x_row, c_row, 0, left, width, s, s,
            INPUTS, FUNCTIONS, OUTPUTS, ACROSS,
        )  # fmt: skip
    async_copy.wait_group(AHEAD - 1)
    x = x_ring.index(0).load(values).to(gl.float32)
    state = START(x, places_ptr, B, NUMBERS)
    value, _slope, state = step(state, x, 0, STEP, NUMBERS, FUNCTIONS, BASE)
    phi = _operand(value, dtype)
    y = gl.zeros((TOKENS, OUT), gl.float32, product)
    slot, free = 0, AHEAD
    for first in range(0, INPUTS, IN):
        for b in gl.static_range(FUNCTIONS):
            async_copy.wait_group(AHEAD - 1)
            fence_async_shared()
            c = c_ring.index(slot).permute((1, 0)) if ACROSS else c_ring.index(slot)
            y = warpgroup_mma(phi, c, y, is_async=True)
            y = warpgroup_mma_wait(1, deps=[y])
            _copy_for_sums(
                x_ring, c_ring, x_row, c_row, first, left, width, free, b + AHEAD,
                INPUTS, FUNCTIONS, OUTPUTS, ACROSS,
            )  # fmt: skip
            if b == FUNCTIONS - 1:
                # Zeros after the last.
                x = x_ring.index((first // IN + 1) % SLICES).load(values).to(gl.float32)
                state = START(x, places_ptr, B, NUMBERS)
            value, _slope, state = step(
                state, x, (b + 1) % FUNCTIONS, STEP, NUMBERS, FUNCTIONS, BASE
            )
            phi = _operand(value, dtype)
            slot, free = _next(slot, SLOTS), _next(free, SLOTS)
        x_row += IN
        c_row += IN if ACROSS else IN * FUNCTIONS * OUTPUTS
    y = warpgroup_mma_wait(0, deps=[y])
    async_copy.wait_group(0)
    n = gl.arange(0, TOKENS, gl.SliceLayout(1, product))[:, None]
    o = gl.arange(0, OUT, gl.SliceLayout(0, product))[None, :]
    y_tile = y_ptr + row.to(gl.int64) * (TOKENS * OUTPUTS) + column * OUT + n * OUTPUTS + o
    gl.store(y_tile, y.to(y_ptr.dtype.element_ty), mask=(n < left) & (o < width))


@gluon.jit
def _columns(tile, WIDTH: gl.constexpr, dtype: gl.constexpr):
    """A product as a tuple of others with so many columns each, which no number moves for."""
    if tile.shape[1] == WIDTH:
        layout: gl.constexpr = _product(WIDTH, gl.num_warps(), dtype)
        return (gl.convert_layout(tile, layout, assert_trivial=True),)
    else:  # noqa: RET505
        halves = gl.reshape(tile, [tile.shape[0], 2, tile.shape[1] // 2])
        low, high = gl.split(gl.permute(halves, (0, 2, 1)))
        return _columns(low, WIDTH, dtype) + _columns(high, WIDTH, dtype)


@gluon.jit
def _copy_for_input_gradients(
    dy_ring, c_ring, dy_row, c_row, ahead, slot, left, known, there,
    begin: gl.constexpr, TOGETHER: gl.constexpr,
    INPUTS: gl.constexpr, FUNCTIONS: gl.constexpr, OUTPUTS: gl.constexpr,
):  # fmt: skip
    """Copy c for a turn, and dy for the one after it."""
    OUT: gl.constexpr = c_ring.shape[2]
    for j in gl.static_range(TOGETHER):
        if begin + j < FUNCTIONS:
            tile = c_ring.index(slot * TOGETHER + j)
            _copy(tile, c_row + (begin + j) * OUTPUTS, FUNCTIONS * OUTPUTS, known, there)
    _copy(dy_ring.index(ahead), dy_row + OUT, OUTPUTS, left, there - OUT)
    async_copy.commit_group()


@gluon.jit(do_not_specialize=["tokens", "size"])
def input_gradients_kernel(
    dy_ptr, x_ptr, c_ptr, places_ptr, dx_ptr, tokens, size,
    INPUTS: gl.constexpr, FUNCTIONS: gl.constexpr, OUTPUTS: gl.constexpr,
    START: gl.constexpr, STEP: gl.constexpr, NUMBERS: gl.constexpr, BASE: gl.constexpr,
    TOGETHER: gl.constexpr, TOKENS: gl.constexpr, IN: gl.constexpr, OUT: gl.constexpr,
    AHEAD: gl.constexpr,
):  # fmt: skip
    """dx[n, i] = Σ_b φ_b′(x[n, i]) Σ_o dy[n, o] c[i, b, o], TOGETHER functions in a pass."""
    row, column = _place(gl.program_id(0), gl.cdiv(tokens, TOKENS), gl.cdiv(INPUTS, IN), 8)
    dtype: gl.constexpr = c_ptr.dtype.element_ty
    product: gl.constexpr = _product(IN, gl.num_warps(), dtype)
    values: gl.constexpr = _values(product, dtype)
    # Slopes are evaluated for few columns at a time, or their states would fill the registers.
    WIDTH: gl.constexpr = 16
    few: gl.constexpr = _product(WIDTH, gl.num_warps(), dtype)
    B: gl.constexpr = FUNCTIONS if BASE == "none" else FUNCTIONS - 1
    SLOTS: gl.constexpr = AHEAD + 2
    dy_ring = _ring(dy_ptr, SLOTS, TOKENS, OUT)
    c_ring = _ring(c_ptr, SLOTS * TOGETHER, IN, OUT)
    left, known = tokens - row * TOKENS, INPUTS - column * IN
    start = row.to(gl.int64) * TOKENS
    # The first row of coefficients may lie beyond 2³¹ numbers.
    rows = column.to(gl.int64) * (IN * FUNCTIONS * OUTPUTS)
    x_row, dx_row = x_ptr + start * INPUTS + column * IN, dx_ptr + start * INPUTS + column * IN
    dx = ()
    for _ in gl.static_range(IN // WIDTH):
        dx = dx + (gl.zeros((TOKENS, WIDTH), gl.float32, few),)  # noqa: RUF005
    for begin in gl.static_range(0, FUNCTIONS, TOGETHER):
        dy_row, c_row = dy_ptr + start * OUTPUTS, c_ptr + rows
        # After all that read the tiles of the pass before.
        gl.barrier()
        _copy(dy_ring.index(0), dy_row, OUTPUTS, left, OUTPUTS)
        for s in gl.static_range(AHEAD):
            _copy_for_input_gradients(
                dy_ring, c_ring, dy_row + s * OUT, c_row + s * OUT, s + 1, s, left, known,
                OUTPUTS - s * OUT, begin, TOGETHER, INPUTS, FUNCTIONS, OUTPUTS,
            )  # fmt: skip
        async_copy.wait_group(AHEAD - 1)
        dy = dy_ring.index(0).load(values)
        sums = ()
        for _ in gl.static_range(TOGETHER):
            sums = sums + (gl.zeros((TOKENS, IN), gl.float32, product),)  # noqa: RUF005
        slot, free = 0, AHEAD
        for first in range(0, OUTPUTS, OUT):
            async_copy.wait_group(AHEAD - 1)
            fence_async_shared()
            after = ()
            for j in gl.static_range(TOGETHER):
                if begin + j < FUNCTIONS:
                    c = c_ring.index(slot * TOGETHER + j).permute((1, 0))
                    after = after + (warpgroup_mma(dy, c, sums[j], is_async=True),)  # noqa: RUF005
                else:
                    after = after + (sums[j],)  # noqa: RUF005
            # Those of this turn go on.
            sums = _wait(min(TOGETHER, FUNCTIONS - begin), after)
            slot = _next(slot, SLOTS)
            ahead = _next(free, SLOTS)
            _copy_for_input_gradients(
                dy_ring, c_ring, dy_row + AHEAD * OUT, c_row + AHEAD * OUT, ahead, free, left,
                known, OUTPUTS - first - AHEAD * OUT, begin, TOGETHER,
                INPUTS, FUNCTIONS, OUTPUTS,
            )  # fmt: skip
            dy = dy_ring.index(slot).load(values)
            free = ahead
            dy_row += OUT
            c_row += OUT
        sums = _wait(0, sums)
        async_copy.wait_group(0)
        parts = ()
        for j in gl.static_range(TOGETHER):
            parts = parts + (_columns(sums[j], WIDTH, dtype),)  # noqa: RUF005
        totals = ()
        for k in gl.static_range(IN // WIDTH):
            n = gl.arange(0, TOKENS, gl.SliceLayout(1, few))[:, None]
            i = k * WIDTH + gl.arange(0, WIDTH, gl.SliceLayout(0, few))[None, :]
            there = (n < left) & (i < known)
            x = gl.load(x_row + n * INPUTS + i, mask=there, other=0.0).to(gl.float32)
            state = START(x, places_ptr, B, NUMBERS)
            for b in gl.static_range(begin):
                _value, _slope, state = step(state, x, b, STEP, NUMBERS, FUNCTIONS, BASE)
            total = dx[k]
            for j in gl.static_range(TOGETHER):
                if begin + j < FUNCTIONS:
                    _value, slope, state = step(state, x, begin + j, STEP, NUMBERS, FUNCTIONS, BASE)
                    total += parts[j][k] * slope
            if begin + TOGETHER >= FUNCTIONS:
                total_there = total.to(dx_ptr.dtype.element_ty)
                gl.store(dx_row + n * INPUTS + i, total_there, mask=there)
            totals = totals + (_now(total),)  # noqa: RUF005
        dx = totals


@gluon.jit
def _copy_for_coefficient_gradients(
    x_ring, dy_ring, x_row, dy_row, ahead, slot, there, known, within, turned,
    INPUTS: gl.constexpr, OUTPUTS: gl.constexpr, ACROSS: gl.constexpr,
):  # fmt: skip
    """Copy dy for a turn, and x for the one after it."""
    TOKENS: gl.constexpr = x_ring.shape[1]
    if ACROSS:
        # To the zeros that rows end with.
        _copy(dy_ring.index(slot), dy_row, turned, within, (there + 15) // 16 * 16)
    else:
        _copy(dy_ring.index(slot), dy_row, OUTPUTS, there, within)
    _copy(x_ring.index(ahead), x_row + TOKENS * INPUTS, INPUTS, there - TOKENS, known)
    async_copy.commit_group()


@gluon.jit(do_not_specialize=["tokens", "size", "tokens_each"])
def coefficient_gradients_kernel(
    dy_ptr, x_ptr, places_ptr, dc_ptr, tokens, size, tokens_each, turned,
    INPUTS: gl.constexpr, FUNCTIONS: gl.constexpr, OUTPUTS: gl.constexpr,
    START: gl.constexpr, STEP: gl.constexpr, NUMBERS: gl.constexpr, BASE: gl.constexpr,
    TOGETHER: gl.constexpr, TOKENS: gl.constexpr, IN: gl.constexpr, OUT: gl.constexpr,
    AHEAD: gl.constexpr,
):  # fmt: skip
    """dc[s, i, b, o] = Σ_n φ_b(x[n, i]) dy[n, o] over the s-th part of the tokens, which has
    tokens_each; TOGETHER functions in a pass. In float32 dy is `across`, and `turned` the length
    of its rows.
    """
    row, column = _place(gl.program_id(0), gl.cdiv(INPUTS, IN), gl.cdiv(OUTPUTS, OUT), 8)
    left = gl.minimum(tokens - gl.program_id(1) * tokens_each, tokens_each)
    part = gl.program_id(1).to(gl.int64)
    dtype: gl.constexpr = dy_ptr.dtype.element_ty
    product: gl.constexpr = _product(OUT, gl.num_warps(), dtype)
    values: gl.constexpr = _values(product, dtype)
    ACROSS: gl.constexpr = dtype == gl.float32
    after_a_token = 1 if ACROSS else OUTPUTS
    B: gl.constexpr = FUNCTIONS if BASE == "none" else FUNCTIONS - 1
    SLOTS: gl.constexpr = AHEAD + 2
    x_ring = _ring(x_ptr, SLOTS, TOKENS, IN)
    dy_ring = _ring(dy_ptr, SLOTS, OUT if ACROSS else TOKENS, TOKENS if ACROSS else OUT)
    known, within = INPUTS - row * IN, OUTPUTS - column * OUT
    i = gl.arange(0, IN, gl.SliceLayout(1, product))[:, None]
    o = gl.arange(0, OUT, gl.SliceLayout(0, product))[None, :]
    dc_rows = dc_ptr + (part * INPUTS + row * IN) * (FUNCTIONS * OUTPUTS)
    dc_tile = dc_rows + column * OUT + i * (FUNCTIONS * OUTPUTS) + o
    for begin in gl.static_range(0, FUNCTIONS, TOGETHER):
        x_row = x_ptr + part * tokens_each * INPUTS + row * IN
        dy_row = dy_ptr + part * tokens_each * after_a_token
        if ACROSS:
            dy_row += (column * OUT).to(gl.int64) * turned
        else:
            dy_row += column * OUT
        # After all that read the tiles of the pass before.
        gl.barrier()
        _copy(x_ring.index(0), x_row, INPUTS, left, known)
        for s in gl.static_range(AHEAD):
            _copy_for_coefficient_gradients(
                x_ring, dy_ring, x_row + s * TOKENS * INPUTS, dy_row + s * TOKENS * after_a_token,
                s + 1, s, left - s * TOKENS, known, within, turned,
                INPUTS, OUTPUTS, ACROSS,
            )  # fmt: skip
        async_copy.wait_group(AHEAD - 1)
        x = x_ring.index(0).permute((1, 0)).load(values).to(gl.float32)
        state = START(x, places_ptr, B, NUMBERS)
        for b in gl.static_range(begin + 1):
            value, _slope, state = step(state, x, b, STEP, NUMBERS, FUNCTIONS, BASE)
        phi = _operand(value, dtype)
        sums = ()
        for _ in gl.static_range(TOGETHER):
            sums = sums + (gl.zeros((IN, OUT), gl.float32, product),)  # noqa: RUF005
        slot, free = 0, AHEAD
        for first in range(0, left, TOKENS):
            async_copy.wait_group(AHEAD - 1)
            fence_async_shared()
            dy = dy_ring.index(slot).permute((1, 0)) if ACROSS else dy_ring.index(slot)
            slot = _next(slot, SLOTS)
            ahead = _next(free, SLOTS)
            after = ()
            for j in gl.static_range(TOGETHER):
                if begin + j < FUNCTIONS:
                    new = warpgroup_mma(phi, dy, sums[j], is_async=True)
                    after = after + (warpgroup_mma_wait(1, deps=[new]),)  # noqa: RUF005
                    if j == 0:
                        # Zeros beyond the tokens, where no function need be zero.
                        _copy_for_coefficient_gradients(
                            x_ring, dy_ring,
                            x_row + AHEAD * TOKENS * INPUTS,
                            dy_row + AHEAD * TOKENS * after_a_token,
                            ahead, free, left - first - AHEAD * TOKENS, known, within,
                            turned, INPUTS, OUTPUTS, ACROSS,
                        )  # fmt: skip
                    if j + 1 < TOGETHER and begin + j + 1 < FUNCTIONS:
                        value, _slope, state = step(
                            state, x, begin + j + 1, STEP, NUMBERS, FUNCTIONS, BASE
                        )
                    else:
                        x = x_ring.index(slot).permute((1, 0)).load(values).to(gl.float32)
                        state = START(x, places_ptr, B, NUMBERS)
                        for b in gl.static_range(begin + 1):
                            value, _slope, state = step(state, x, b, STEP, NUMBERS, FUNCTIONS, BASE)
                    phi = _operand(value, dtype)
                else:
                    after = after + (sums[j],)  # noqa: RUF005
            sums = after
            free = ahead
            x_row += TOKENS * INPUTS
            dy_row += TOKENS * after_a_token
        sums = _wait(0, sums)
        async_copy.wait_group(0)
        for j in gl.static_range(TOGETHER):
            if begin + j < FUNCTIONS:
                gl.store(
                    dc_tile + (begin + j) * OUTPUTS,
                    sums[j].to(dc_ptr.dtype.element_ty),
                    mask=(i < known) & (o < within),
                )
