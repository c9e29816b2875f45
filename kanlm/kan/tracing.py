"""What torch does beside computing: it traces, transforms and casts."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.jit._trace import is_tracing

_Function = TypeVar("_Function", bound=Callable[..., object])


def constant_when_traced(function: _Function) -> _Function:
    """Have torch.compile call the function once and take what it returns as a constant.

    `torch.compiler.assume_constant_result` does this, and nothing else, after it has imported the
    compiler, and with it triton: a second and more of everyone's start.
    """
    function._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
    return function


def observed(x: Tensor) -> str | None:
    """What is at work that has to see torch's operators, and that kernels which read memory would
    be hidden from; or None.
    """
    if torch.compiler.is_compiling() or is_tracing():
        return "compiled code"
    if forward_ad._current_level >= 0 or peek_interpreter_stack() is not None:
        return "forward-mode gradients and torch.func"
    # Which meta tensors have none of, and asking is an error.
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        return "autocast"
    return None
