"""What torch does beside computing: it traces, transforms and casts."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

# Private: nothing public says whether transforms are at work, and where they are the sum of an
# operator without a tangent would be taken for a constant.
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

_Function = TypeVar("_Function", bound=Callable[..., object])


def constant_when_traced(function: _Function) -> _Function:
    """Have torch.compile call the function once and take what it returns as a constant.

    `torch.compiler.assume_constant_result` does this, and nothing else, after it has imported the
    compiler, and with it triton: a second and more of everyone's start.
    """
    function._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
    return function


def is_jit_tracing() -> bool:
    """Whether torch.jit.trace records operators."""
    return torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]


@constant_when_traced
def has_transforms() -> bool:
    """Whether torch.func's transforms are at work, in code that torch.compile traces."""
    return peek_interpreter_stack() is not None


def observed(x: Tensor) -> str | None:
    """What needs torch's own operators on x, which kernels that read memory would hide; or None.

    In eager code torch.func's transforms are known by their tensors: see `plain_tensors`.
    """
    if torch.compiler.is_compiling():
        return "torch.func in compiled code" if has_transforms() else _autocast(x)
    if is_jit_tracing():
        return "torch.jit.trace"
    if forward_ad.unpack_dual(x).tangent is not None:
        return "forward-mode gradients"
    return _autocast(x)


def _autocast(x: Tensor) -> str | None:
    # Which meta tensors have none of, and asking is an error.
    return "autocast" if not x.is_meta and torch.is_autocast_enabled(x.device.type) else None
