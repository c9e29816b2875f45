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

    Args:
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


def own_rows(tensor: Tensor) -> tuple[int, int]:
    """First row that this process holds, and the one after the last: all if it is not sharded.

    The rows of a tensor without dimensions are those of a vector of one number.

    Raises:
        ValueError: it is split otherwise than by rows, or by several dimensions of the mesh.
    """
    rows = tensor.shape[0] if tensor.ndim else 1
    if not is_sharded(tensor):
        return 0, rows
    from torch.distributed.tensor import DTensor

    assert isinstance(tensor, DTensor)
    start, stop = 0, rows
    for dimension, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            continue
        if not placement.is_shard(0) or (start, stop) != (0, rows):
            raise ValueError(f"placements {tensor.placements}: expected one split, by rows")
        # As torch.chunk does: the last parts may be shorter, or empty.
        size = -(-rows // tensor.device_mesh.size(dimension))
        start = min(rows, size * tensor.device_mesh.get_local_rank(dimension))
        stop = min(rows, start + size)
    return start, stop


def is_first_copy(tensor: Tensor, rank: int) -> bool:
    """Whether of the processes that hold the same rows this one, `rank`, is the first."""
    if not is_sharded(tensor):
        return rank == 0
    from torch.distributed.tensor import DTensor

    assert isinstance(tensor, DTensor)
    mesh = tensor.device_mesh
    return all(
        mesh.get_local_rank(dimension) == 0
        for dimension, placement in enumerate(tensor.placements)
        if placement.is_replicate()
    )


def own_part(tensor: Tensor) -> Tensor:
    """The rows of `own_rows`, in the tensor's own memory."""
    if not is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import DTensor

    assert isinstance(tensor, DTensor)
    return tensor.to_local()


def from_own_part(tensor: Tensor, part: Tensor) -> Tensor:
    """A tensor sharded as `tensor` is, of the rows that each rank gives.

    Args:
        part: of the shape of `own_part(tensor)`.
    """
    if not is_sharded(tensor):
        return part
    from torch.distributed.tensor import DTensor

    assert isinstance(tensor, DTensor)
    return DTensor.from_local(
        part,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )
