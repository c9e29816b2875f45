"""What Triton launches for the sums of a layer and for their gradients: which kernel, on what
grid, and the tiles that it may choose among.

Nothing here needs a GPU, so that `scripts/gpu_kernels` compiles what would be launched on one.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import triton
from torch import Tensor

from . import triton_kernels as portable
from .triton_formulas import FORMULAS

#: Capability that `triton_hopper` is for.
HOPPER = (9, 0)
#: Version of Triton whose Gluon, which may still change, `triton_hopper` is written in. Another
#: has the kernels that run on any GPU.
GLUON = "3.7."


class Launch(NamedTuple):
    """A kernel, ready to be compiled or run.

    Attributes:
        kernel: a jitted function.
        configs: what may be chosen among, by timing.
        grid: sizes of tiles → numbers of programs.
        arguments: tensors, numbers and None, in the kernel's order.
        constants: what else it is compiled with, by name.
    """

    kernel: Any
    configs: tuple[triton.Config, ...]
    grid: Callable[[dict[str, int]], tuple[int, ...]]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]

    def run(self) -> None:
        device = self.arguments[0].device
        with torch.cuda.device(device if device.type == "cuda" else -1):
            _tuned(self.kernel, self.configs)[self.grid](*self.arguments, **self.constants)


@functools.cache
def _tuned(kernel: Any, configs: tuple[triton.Config, ...]) -> Any:
    """The kernel, which measures its configurations when it first sees a size and keeps the
    result in Triton's cache, also for processes to come.
    """
    key = ["size", "INPUTS", "OUTPUTS", "FUNCTIONS", "BASE"]
    return triton.autotune(list(configs), key=key, cache_results=True)(kernel)


class Target(NamedTuple):
    """A GPU: its compute capability, how many processors share the work, and the bytes of shared
    memory that a program may have.
    """

    capability: tuple[int, int]
    processors: int
    shared: int

    @classmethod
    def of(cls, device: torch.device) -> "Target":
        """The GPU that tensors are on; in Triton's interpreter one of any kind."""
        if device.type != "cuda":
            return cls((8, 0), 1, 0)
        properties = torch.cuda.get_device_properties(device)
        return cls(
            (properties.major, properties.minor),
            properties.multi_processor_count,
            properties.shared_memory_per_block_optin,
        )


def sums(
    x: Tensor,
    c: Tensor,
    formula: str,
    numbers: tuple[float, ...],
    places: Tensor | None,
    base: str,
    target: Target,
) -> tuple[Tensor, Launch]:
    """y of x (tokens, in) and c (in, B, out), both contiguous, in the dtype of c.

    Args:
        formula, numbers, places: of the basis.
        base: the function that the last of B is, `silu`, `identity` or `none`.
    """
    (tokens, inputs), (_, functions, outputs) = x.shape, c.shape
    y = x.new_empty(tokens, outputs, dtype=c.dtype)
    kernel, configs, constants = _choose(
        "sums", x, c.dtype, functions, outputs, formula, numbers, target
    )
    launch = Launch(
        kernel,
        configs,
        lambda meta: (_count(tokens, meta["TOKENS"]) * _count(outputs, meta["OUT"]),),
        (x, _multiplied(kernel, c), places, y, tokens, _size(tokens)),
        constants | _of_basis(formula, numbers, base, inputs, functions, outputs),
    )
    return y, launch


def input_gradients(
    dy: Tensor,
    x: Tensor,
    c: Tensor,
    formula: str,
    numbers: tuple[float, ...],
    places: Tensor | None,
    base: str,
    target: Target,
) -> tuple[Tensor, Launch]:
    """dx in the dtype of x, for dy (tokens, out) in the dtype of c; the rest as of `sums`."""
    (tokens, inputs), (_, functions, outputs) = x.shape, c.shape
    dx = torch.empty_like(x)
    kernel, configs, constants = _choose(
        "input_gradients", x, c.dtype, functions, outputs, formula, numbers, target
    )
    launch = Launch(
        kernel,
        configs,
        lambda meta: (_count(tokens, meta["TOKENS"]) * _count(inputs, meta["IN"]),),
        (dy, x, c, places, dx, tokens, _size(tokens)),
        constants | _of_basis(formula, numbers, base, inputs, functions, outputs),
    )
    return dx, launch


def coefficient_gradients(
    dy: Tensor,
    x: Tensor,
    functions: int,
    formula: str,
    numbers: tuple[float, ...],
    places: Tensor | None,
    base: str,
    target: Target,
) -> tuple[Tensor, Launch]:
    """dc (parts, in, B, out) in float32, for dy (tokens, out); the rest as of `sums`.

    Sums over few tiles of many tokens are split into parts, whose sum does not depend on
    which was ready first.
    """
    (tokens, inputs), outputs = x.shape, dy.shape[1]
    parts = _parts(tokens, inputs * functions * outputs, target.processors)
    # A multiple of every tile of tokens.
    tokens_each = 128 * _count(_count(tokens, parts), 128)
    parts = _count(tokens, tokens_each)
    dc = x.new_empty(parts, inputs, functions, outputs, dtype=torch.float32)
    kernel, configs, constants = _choose(
        "coefficient_gradients", x, dy.dtype, functions, outputs, formula, numbers, target
    )
    multiplied = _multiplied(kernel, dy)
    arguments = (multiplied, x, places, dc, tokens, _size(tokens), tokens_each)
    if "EVEN_TOKENS" in kernel.arg_names:
        constants = constants | {"EVEN_TOKENS": tokens % tokens_each == 0}
    else:
        arguments += (multiplied.shape[1],)
    launch = Launch(
        kernel,
        configs,
        lambda meta: (_count(inputs, meta["IN"]) * _count(outputs, meta["OUT"]), parts),
        arguments,
        constants | _of_basis(formula, numbers, base, inputs, functions, outputs),
    )
    return dc, launch


def run(prepare: Callable[..., tuple[Tensor, Launch]], *arguments: Any) -> Tensor:
    """What one of the above computes, on the device of its first argument."""
    result, launch = prepare(*arguments, Target.of(arguments[0].device))
    launch.run()
    return result


def _multiplied(kernel: Any, factor: Tensor) -> Tensor:
    """c or dy as a kernel takes it: across, for float32 on an H100."""
    if factor.dtype != torch.float32 or "AHEAD" not in kernel.arg_names:
        return factor
    from . import triton_hopper

    return triton_hopper.across(factor)


def _of_basis(
    formula: str, numbers: tuple[float, ...], base: str, inputs: int, functions: int, outputs: int
) -> dict[str, Any]:
    start, step = FORMULAS[formula]
    return {
        "INPUTS": inputs,
        "FUNCTIONS": functions,
        "OUTPUTS": outputs,
        "START": start,
        "STEP": step,
        "NUMBERS": numbers,
        "BASE": base,
    }


def _parts(tokens: int, coefficients: int, processors: int) -> int:
    """Parts of a sum over tokens that give every processor work."""
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


# Kernels and tiles


#: Programs a processor should have to itself, so that the last round is no large part.
_ROUNDS = 4
#: Tokens that make one more part of a sum over tokens worth adding up.
_LEAST_TOKENS = 2048
#: Sums that a program holds: 128 registers a thread of 8 warps, half of what there are.
_ACCUMULATORS = 128 * 256


def _choose(
    name: str,
    x: Tensor,
    dtype: torch.dtype,
    functions: int,
    outputs: int,
    formula: str,
    numbers: tuple[float, ...],
    target: Target,
) -> tuple[Any, tuple[triton.Config, ...], dict[str, Any]]:
    """Kernel, its configurations, and how it multiplies float32.

    Args:
        formula, numbers: of the basis.
    """
    exact = _products(dtype) == "exact"
    gluon = triton.__version__.startswith(GLUON) and not portable.INTERPRETED
    if target.capability == HOPPER and gluon:
        from . import triton_hopper as hopper

        if not exact and hopper.fits(name, x, dtype, outputs):
            # What takes more registers has tiles with fewer sums: numbers of 32 bits, and the
            # recurrence with its slope, of polynomials that go on linearly.
            narrow = dtype == torch.float32 or (formula == "polynomials" and not numbers[1])
            kernel = getattr(hopper, f"{name}_kernel")
            return kernel, _HOPPER_CONFIGS[name](functions, narrow), {}
    kernel = getattr(portable, f"{name}_kernel")
    if portable.INTERPRETED or exact:
        sizes = _SMALLEST if portable.INTERPRETED else _EXACT
        configs = _config(4, 1, **{k: v for k, v in sizes.items() if k in kernel.arg_names})
        configs = (configs,)
    else:
        configs = _CONFIGS[name](functions, dtype.itemsize, target.shared)
    return kernel, configs, {"PRECISION": "ieee" if exact else "tf32"}


def _config(warps: int, stages: int, **sizes: int) -> triton.Config:
    # Unless it may take all registers, ptxas would rather spill some than run fewer programs.
    return triton.Config(sizes, num_warps=warps, num_stages=stages, maxnreg=255)


#: Where float32 is multiplied as such, by the ordinary cores: large tiles take minutes to
#: compile.
_EXACT = {"TOGETHER": 1, "TOKENS": 32, "IN": 32, "OUT": 32}
#: Two functions in a pass, so that tests see several passes.
_SMALLEST = {"TOGETHER": 2, "TOKENS": 16, "IN": 16, "OUT": 16}


# On a GPU of capability 9.0


def _hopper_sums(functions: int, narrow: bool) -> tuple[triton.Config, ...]:
    del functions
    return tuple(
        _config(warps, 1, TOKENS=16 * warps, IN=32, OUT=out, AHEAD=ahead)
        for warps, out, ahead in ((8, 256, 2), (8, 128, 3), (4, 256, 2), (4, 128, 3))
        if out <= 128 or not narrow
    )


def _hopper_input_gradients(functions: int, narrow: bool) -> tuple[triton.Config, ...]:
    del narrow
    # With several passes dx is in registers, too, and 256 sums a row would not fit beside it.
    most = 256 if functions <= 4 else 128
    return tuple(
        _config(warps, 1, TOGETHER=together, TOKENS=16 * warps, IN=64, OUT=64, AHEAD=2)
        for warps in (8, 4)
        for together in _shares(functions)
        if together * 64 <= most
    )


def _hopper_coefficient_gradients(functions: int, narrow: bool) -> tuple[triton.Config, ...]:
    return tuple(
        _config(warps, 1, TOGETHER=together, TOKENS=32, IN=16 * warps, OUT=columns, AHEAD=2)
        for warps in (8, 4)
        for together, columns in ((4, 32), (3, 64), (2, 64), (4, 64), (2, 128), (1, 128))
        # A product that is alone in its loop would wait for itself: φ is then carried around.
        if together in _shares(functions) and (functions % together != 1 or functions == 1)
        if together > 1 or functions == 1
        if columns < 128 or warps == 8
        if functions == 1 or together * columns in ((128, 192) if narrow else (192, 256))
    )


def _shares(functions: int) -> list[int]:
    """How many functions to take together, so that the passes are about equally long."""
    return sorted({_count(functions, passes) for passes in range(1, functions + 1)})


_HOPPER_CONFIGS: dict[str, Callable[[int, bool], tuple[triton.Config, ...]]] = {
    "sums": functools.cache(_hopper_sums),
    "input_gradients": functools.cache(_hopper_input_gradients),
    "coefficient_gradients": functools.cache(_hopper_coefficient_gradients),
}


# On any


def _sums(functions: int, size: int, shared: int) -> tuple[triton.Config, ...]:
    configs = []
    together = _count(functions, _count(functions, 5))
    for tokens, out, warps in ((128, 128, 8), (64, 64, 4)):
        for stages in (3, 4):
            # Inputs may be float32 whatever the products are in.
            most = shared // (stages * (together * out * size + tokens * 4))
            if most >= 16:
                sizes = {"TOKENS": tokens, "IN": 32 if most >= 32 else 16, "OUT": out}
                configs.append(_config(warps, stages, TOGETHER=together, **sizes))
    return tuple(configs)


def _input_gradients(functions: int, size: int, shared: int) -> tuple[triton.Config, ...]:
    del shared
    return tuple(
        _config(warps, 3, TOGETHER=together, TOKENS=tokens, IN=columns, OUT=128 // size)
        for warps, tokens, together, columns in (
            (8, 64, 1, 128), (8, 128, 1, 64), (4, 64, 1, 64), (4, 64, 2, 32)
        )
        if together <= functions
    )  # fmt: skip


def _coefficient_gradients(functions: int, size: int, shared: int) -> tuple[triton.Config, ...]:
    del shared
    return tuple(
        _config(warps, stages, TOGETHER=together, TOKENS=64 // size, IN=64, OUT=columns)
        for warps, stages, together, columns in (
            (8, 3, 1, 128), (8, 4, 1, 128), (8, 3, 2, 64), (8, 3, 4, 32),
            (4, 3, 1, 128), (4, 3, 1, 64), (4, 4, 2, 32),
        )
        if together <= functions
    )  # fmt: skip


_CONFIGS: dict[str, Callable[[int, int, int], tuple[triton.Config, ...]]] = {
    "sums": functools.cache(_sums),
    "input_gradients": functools.cache(_input_gradients),
    "coefficient_gradients": functools.cache(_coefficient_gradients),
}
