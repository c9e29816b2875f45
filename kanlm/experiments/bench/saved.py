"""What a module keeps for its backward pass, counted exactly."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def saved_bytes(run: Callable[[Tensor], Tensor], x: Tensor, module: nn.Module) -> int:
    """Bytes that autograd keeps beside the input and the module's own tensors.

    A storage counts once, however many saved tensors look into it.

    Arguments:
        run: `module`, or what torch.compile made of it.
    """
    own = {t.untyped_storage().data_ptr() for t in (x, *module.parameters(), *module.buffers())}
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run(x)
    return sum(storages.values())
