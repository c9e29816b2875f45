"""Facts of the machine in code that torch.compile traces."""

from collections.abc import Callable
from typing import TypeVar

_Function = TypeVar("_Function", bound=Callable[..., object])


def constant_when_traced(function: _Function) -> _Function:
    """Have torch.compile call the function once and take what it returns as a constant.

    `torch.compiler.assume_constant_result` does this, and nothing else, after it has imported the
    compiler, and with it triton: a second and more of everyone's start.
    """
    function._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
    return function
