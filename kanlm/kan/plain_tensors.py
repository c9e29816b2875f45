"""Tensors whose memory holds their numbers: those that C++ may be given a pointer to."""

import torch
from torch import Tensor, nn


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor holds its numbers where `data_ptr` says.

    Subclasses need not, nor do those that torch.func's transforms wrap, nor views that negate.
    """
    if type(tensor) not in (Tensor, nn.Parameter):
        return False
    if torch.compiler.is_compiling():
        return True  # as what runs in the place of a traced tensor is
    if tensor.is_neg():
        return False
    try:
        return tensor.data_ptr() != 0 or tensor.numel() == 0
    except RuntimeError:
        return False


def is_cpu_float32(tensor: Tensor) -> bool:
    """Whether a tensor is plain, on a CPU, and of float32."""
    return is_plain(tensor) and tensor.device.type == "cpu" and tensor.dtype == torch.float32
