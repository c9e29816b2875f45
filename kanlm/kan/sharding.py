"""Tensors of which every process holds a part: DTensors, as FSDP2 makes of parameters.

They are told by an attribute and their module is imported late, because that takes a second
of everyone's start.
"""

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    return hasattr(tensor, "device_mesh")


def whole_like(tensor: Tensor) -> Tensor:
    """Memory for all of the tensor, of its dtype and on its device."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def gathered(tensor: Tensor) -> Tensor:
    """All of the tensor, in every process; the tensor itself where it is not sharded."""
    if not is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import DTensor

    assert isinstance(tensor, DTensor)
    return tensor.full_tensor()


def split_as(tensor: Tensor, whole: Tensor, *, alike: bool = False) -> Tensor:
    """Split what every process has whole, as `tensor` is split; `whole` itself if it is not.

    Arguments:
        whole: of the tensor's shape.
        alike: it is the same in every process. Otherwise the first one's is sent to all.
    """
    if not is_sharded(tensor):
        return whole
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(tensor, DTensor)
    return distribute_tensor(
        whole.contiguous(),
        tensor.device_mesh,
        tensor.placements,
        src_data_rank=None if alike else 0,
    )
