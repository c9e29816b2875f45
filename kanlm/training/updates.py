"""How far an optimizer's step moves the parameters."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from kanlm.kan.sharding import gathered


@contextmanager
def measured_update(optimizer: torch.optim.Optimizer) -> Iterator[dict[str, Tensor]]:
    """Measure the step that is taken within the block.

    Holds a copy of all parameters meanwhile, when activations are gone; nothing waits for
    the device. Of sharded parameters all processes must measure at once.

    Yields a dictionary that is filled afterwards: `update_norm`, the Euclidean length of the
    change of all parameters, and `update_norm/GROUP` of each group, where there are several.
    """
    norms: dict[str, Tensor] = {}
    groups = optimizer.param_groups
    before = [[p.detach().clone() for p in group["params"]] for group in groups]
    yield norms
    parts = []
    for group, changes in zip(groups, before, strict=True):
        for change, parameter in zip(changes, group["params"], strict=True):
            change.sub_(parameter.detach())
        parts.append(gathered(torch.nn.utils.get_total_norm(changes)))
        if len(groups) > 1:
            norms[f"update_norm/{group['name']}"] = parts[-1]
    norms["update_norm"] = torch.stack(parts).norm()
