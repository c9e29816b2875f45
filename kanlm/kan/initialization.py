"""Filling parameters at their start.

transformers marks a tensor that it has loaded from a file, and guards `torch.nn.init` so
that loading leaves it alone; `assign_` does the same for starts that are computed.

A sharded parameter starts as its part of what the whole would start as. So a model that is
built on the meta device, sharded by FSDP2 and then reset starts as if it had never been
split, with the same numbers for the same seed. For that each process draws the whole
parameter, one at a time, and the first one's numbers are sent to all.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .sharding import is_sharded, split_as, whole_like


def uniform_(parameter: Tensor, variance: float) -> None:
    """Draw from the uniform distribution around 0 with this variance."""
    bound = math.sqrt(3 * variance)
    draw_(parameter, nn.init.uniform_, -bound, bound)


def draw_(parameter: Tensor, init_: Callable[..., Any], *args: Any, **options: Any) -> None:
    """Draw by `init_`, a function of `torch.nn.init`, and what it takes after the tensor."""
    if is_sharded(parameter):
        # It would draw the parts of a sharded one apart, on the CPU all alike.
        start = whole_like(parameter)
        init_(start, *args, **options)
        assign_(parameter, start)
    else:
        init_(parameter, *args, **options)


def assign_(parameter: Tensor, start: Tensor) -> None:
    """Copy `start`, which is whole and broadcasts to the parameter's shape."""
    if getattr(parameter, "_is_hf_initialized", False):
        return
    with torch.no_grad():
        if is_sharded(parameter):
            start = split_as(parameter, start.to(parameter.dtype).expand(parameter.shape))
        parameter.copy_(start)
