"""The fixed functions that a layer can lay beside its basis on every edge."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

BaseFunction = Literal["silu", "identity"]


def _silu_slope(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


BASE_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "identity": lambda x: x}
BASE_SLOPES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": _silu_slope,
    "identity": torch.ones_like,
}
#: Gradient of the function's value and x → gradient of x, of which nobody asks a gradient.
BASE_GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": torch.ops.aten.silu_backward,
    "identity": lambda gradient, x: gradient,
}
#: What C++ calls them.
BASE_CODES = {None: 0, "silu": 1, "identity": 2}
#: FLOPs at one input, counted as `Basis.flops_per_input`.
BASE_FLOPS = {"silu": 4, "identity": 0}
