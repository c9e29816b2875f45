"""What the model's own modules count in training: read at log lines, kept in checkpoints.

The modules are those of `kanlm.kan.monitoring`. Their sums stay on the device until a
line is due; then those of all processes are added up in one all-reduce.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from kanlm.kan.monitoring import Monitored

#: Module's name → its sums over the steps since the last log line, and over processes.
Sums = dict[str, list[float]]


class Monitor:
    """The monitored modules of one model.

    Arguments:
        model: not wrapped; wrapping and compiling it changes nothing here.
        device: where its modules count.
        reduce: sums a tensor over processes.
    """

    def __init__(
        self, model: nn.Module, device: torch.device, reduce: Callable[[Tensor], Tensor]
    ) -> None:
        self.modules = {
            name: module for name, module in model.named_modules() if isinstance(module, Monitored)
        }
        self.device = device
        self.reduce = reduce

    def start(self, sums: Mapping[str, list[float]]) -> None:
        """Count on from `sums`, from 0 where a module has none.

        Sums over processes must be given to one process only.
        """
        for name, module in self.modules.items():
            module.start_counting(self.device)
            if name in sums:
                module.count(torch.tensor(sums[name], dtype=torch.float64, device=self.device))

    def read(self) -> Sums:
        """Sums over all processes, which must all ask at once: this waits for the device."""
        if not self.modules:
            return {}
        parts = [module.sums for module in self.modules.values() if module.sums is not None]
        values = iter(self.reduce(torch.cat(parts)).tolist())
        return {
            name: [next(values) for _ in range(module.num_sums)]
            for name, module in self.modules.items()
        }

    def figures(self, sums: Sums) -> dict[str, float]:
        """What `sums` mean, as `module/figure`."""
        return {
            f"{name}/{figure}": value
            for name, module in self.modules.items()
            for figure, value in module.figures(sums[name]).items()
        }
