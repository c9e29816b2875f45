"""Bases as Triton's kernels evaluate them, in registers, one function after another.

A basis is two jitted functions, in FORMULAS by name:

- start(x, places, B, NUMBERS) → state, for x a tile in float32;
- step(state, b, B, NUMBERS) → value, slope, state, asked for b = 0, 1, … in turn.

`places` points to a tensor that may change while the model trains, NUMBERS are compiled in, B
and b are known to the compiler. Whichever of value and slope a kernel leaves unread costs
nothing. All is elementwise, so that no thread needs a value of another, and makes no tensor out
of nothing, whose layout Gluon would ask for.
"""

# Jitted functions are Python in form alone, and what they call raises outside of them.
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

from typing import Any

import triton
import triton.language as tl


@triton.jit
def _everywhere(value, x):
    """A number as a tile like x."""
    return tl.where(x == x, value, value)


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
        tail = x
    else:
        # Comparisons, so that NaN stays what it is.
        inside = tl.where(x > half_width, half_width, tl.where(x < -half_width, -half_width, x))
        bend = _everywhere(1.0, x)
        tail = x - inside
    zero, one = _everywhere(0.0, x), _everywhere(1.0, x)
    return inside, bend, tail, zero, one, zero, zero


@triton.jit
def _step_polynomials(state, b: tl.constexpr, B: tl.constexpr, NUMBERS: tl.constexpr):
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
def _least(x, least):
    """max(x, least), which keeps NaN, in one instruction."""
    return tl.maximum(x, least, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _start_splines(x, places, B: tl.constexpr, NUMBERS: tl.constexpr):
    """NUMBERS: the degree, 0 to 3. `places` has all knots, of which the ends of the grid say
    all; the state is in units of a cell.
    """
    degree: tl.constexpr = int(NUMBERS[0])
    cells: tl.constexpr = B - degree
    low = tl.load(places + degree).to(tl.float32)
    high = tl.load(places + B).to(tl.float32)
    per_unit = cells / (high - low)
    position = (x - low) * per_unit
    # Comparisons, so that NaN stays what it is.
    inside = tl.where(position > cells, cells, tl.where(position < 0, 0, position))
    tail = position - inside
    return position, inside, tl.minimum(tail, 0), tl.maximum(tail, 0), per_unit


@triton.jit
def _step_splines(state, b: tl.constexpr, B: tl.constexpr, NUMBERS: tl.constexpr):
    """Cardinal B-splines as sums of truncated powers of the distance to their middle, of which
    symmetry leaves one or two (Schoenberg, Cardinal Spline Interpolation, 1973, lecture 2).
    """
    position, inside, below, above, per_unit = state
    degree: tl.constexpr = int(NUMBERS[0])
    cells: tl.constexpr = B - degree
    if degree == 0:
        # The cell right of a knot owns it, and the outer ones own the tails.
        value = _everywhere(1.0, position) + 0 * below + 0 * above
        if b > 0:
            value = tl.where(position < b, 0.0, value)
        if b < cells - 1:
            value = tl.where(position >= b + 1, 0.0, value)
        slope = _everywhere(0.0, position)
    elif degree == 1:
        # The outer cells' lines go on.
        rising = position - (b - 1)
        falling = (b + 1) - position
        if b == 0:
            value = falling if cells == 1 else _least(falling, 0.0)
        elif b == cells:
            value = rising if cells == 1 else _least(rising, 0.0)
        elif cells == 2:
            value = tl.minimum(rising, falling)
        elif b == 1:
            value = tl.minimum(rising, tl.maximum(falling, 0.0))
        elif b == cells - 1:
            value = tl.minimum(falling, tl.maximum(rising, 0.0))
        else:
            value = tl.maximum(tl.minimum(rising, falling), 0.0)
        before = per_unit if b > 0 else -per_unit
        after = -per_unit if b < cells else per_unit
        slope = tl.where(position < b, before, after)
        if b > 1:
            slope = tl.where(position < b - 1, 0.0, slope)
        if b < cells - 1:
            slope = tl.where(position >= b + 1, 0.0, slope)
    else:
        distance = inside - (b + (1 - degree) / 2)
        far = tl.abs(distance)
        wide = _least((degree + 1) / 2 - far, 0.0)
        narrow = tl.maximum((degree - 1) / 2 - far, 0.0)
        if degree == 2:
            value = 0.5 * wide * wide - 1.5 * narrow * narrow
            steep = wide - 3 * narrow
        else:
            value = (wide * wide * wide) * (1 / 6) - (narrow * narrow * narrow) * (2 / 3)
            steep = 0.5 * wide * wide - 2 * narrow * narrow
        slope = tl.where(distance < 0, steep, -steep) * per_unit
        # Beyond the grid only functions with a slope at its end change.
        at_end: tl.constexpr = 1.0 if degree == 2 else 0.5
        if b == 0:
            value -= at_end * below
        if b == degree - 1:
            value += at_end * below
        if b == B - degree:
            value -= at_end * above
        if b == B - 1:
            value += at_end * above
    return value, slope, state


#: (start, step) of the bases that have a formula, by the names that `fused` knows them by.
FORMULAS: dict[str, tuple[Any, Any]] = {
    "polynomials": (_start_polynomials, _step_polynomials),
    "splines": (_start_splines, _step_splines),
}


@triton.jit
def step(
    state, x, b: tl.constexpr, STEP: tl.constexpr, NUMBERS: tl.constexpr,
    FUNCTIONS: tl.constexpr, BASE: tl.constexpr,
):  # fmt: skip
    """A step of the basis; the base function, where there is one, is the last of FUNCTIONS."""
    B: tl.constexpr = FUNCTIONS if BASE == "none" else FUNCTIONS - 1
    if b == B and BASE == "silu":
        share = 1 / (1 + tl.exp(-x))
        value, slope = x * share, share * (1 + x * (1 - share))
    elif b == B and BASE == "identity":
        value, slope = x, _everywhere(1.0, x)
    else:
        value, slope, state = STEP(state, b, B, NUMBERS)
    return value, slope, state
