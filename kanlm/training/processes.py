"""Sums over the processes of a run."""

import torch
from accelerate import Accelerator


def sum_over_processes(accelerator: Accelerator, tensor: torch.Tensor) -> torch.Tensor:
    """All-reduce; the tensor itself where there is one process."""
    total = accelerator.reduce(tensor, "sum")
    assert isinstance(total, torch.Tensor)
    return total
