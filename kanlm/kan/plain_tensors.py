"""Tensors whose memory holds their numbers: those that C++ may be given a pointer to."""

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor holds its numbers where `data_ptr` says.

    Subclasses need not, nor do those that torch.func's transforms wrap, nor views that negate.
    """
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_neg():
        return False
    return not is_functorch_wrapped_tensor(tensor)


def is_cpu_float32(tensor: Tensor) -> bool:
    """Whether a tensor is plain, on a CPU, and of float32."""
    return is_plain(tensor) and tensor.device.type == "cpu" and tensor.dtype == torch.float32
