"""Filling parameters at their start.

transformers marks a tensor that it has loaded from a file, and guards `torch.nn.init` so
that loading leaves it alone; `assign_` does the same for starts that are computed.
"""

import math

import torch
from torch import Tensor, nn


def uniform_(parameter: Tensor, variance: float) -> None:
    """Draw from the uniform distribution around 0 with this variance."""
    bound = math.sqrt(3 * variance)
    nn.init.uniform_(parameter, -bound, bound)


def assign_(parameter: Tensor, start: Tensor) -> None:
    """Copy `start`, which broadcasts to the parameter's shape."""
    if not getattr(parameter, "_is_hf_initialized", False):
        with torch.no_grad():
            parameter.copy_(start)
