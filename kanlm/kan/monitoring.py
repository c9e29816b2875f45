"""Modules that count what happens in them while they train, for the loop to log.

A router's load or a grid's occupancy is known only inside the forward pass, on the
device, where waiting for a number would stall it. So a module adds to a vector of sums
there, and whoever trains it reads the sums once a log line, adds up those of all
processes, and asks the module what they mean:

    modules = [m for m in model.modules() if isinstance(m, Monitored)]
    for module in modules: module.start_counting(device)
    …                                            # forward passes in training mode
    module.figures(module.sums.tolist())

Sums are what survives a checkpoint and adds up over processes exactly as over steps.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor


class Monitored(ABC):
    """A base beside `nn.Module`. Nothing is counted until someone starts it.

    Every figure must be a ratio of sums: then neither the number of micro-batches nor a
    pass that gradient checkpointing repeats changes it.
    """

    #: Length of the vector that `count` takes.
    num_sums: int
    #: (num_sums,) float64 on the module's device: exact for counts up to 2⁵³. Neither a
    #: buffer, which DistributedDataParallel would overwrite with the first process's, nor
    #: saved with the model.
    sums: Tensor | None = None

    @abstractmethod
    def figures(self, sums: Sequence[float]) -> dict[str, float]:
        """What sums over steps and processes mean, by the name to log it under."""

    def start_counting(self, device: torch.device | str = "cpu") -> None:
        """Count from 0, in the same memory as before, which a compiled graph may hold on to."""
        if self.sums is None or self.sums.device != torch.device(device):
            self.sums = torch.zeros(self.num_sums, dtype=torch.float64, device=device)
        self.sums.zero_()

    def count(self, values: Tensor) -> None:
        """Add a vector to the sums, in one operation, so that they always fit together."""
        if self.sums is not None:
            self.sums.add_(values.detach())
