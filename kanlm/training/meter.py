"""What is summed up between two log lines, on the device until a line is due."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from kanlm.training.monitor import Monitor, Sums
from kanlm.training.processes import sum_over_processes

#: Of each process's own tokens; the other sums are the same in all processes.
_PER_PROCESS = ("loss", "auxiliary_loss")
_SUMMED = (*_PER_PROCESS, "gradient_norm", "penalty", "tokens")


@dataclass
class Window:
    """Sums over the steps since the last log line, over all processes."""

    #: Nats a token, without what the blocks want minimised beside them.
    loss: float = 0.0
    auxiliary_loss: float = 0.0
    gradient_norm: float = 0.0
    penalty: float = 0.0
    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    #: Of the model's monitored modules.
    statistics: Sums = field(default_factory=dict)

    def means(self) -> dict[str, float]:
        """Figures a step or a second."""
        return {
            "loss": self.loss / self.steps,
            "auxiliary_loss": self.auxiliary_loss / self.steps,
            "gradient_norm": self.gradient_norm / self.steps,
            "penalty": self.penalty / self.steps,
            "tokens_per_second": self.tokens / self.seconds,
        }


class Meter:
    """The window that is open, its sums still on the device.

    Arguments:
        model: not wrapped; its monitored modules count along.
        accelerator: says where, and adds up processes.
        window: to go on from, as of all processes.
    """

    def __init__(self, model: nn.Module, accelerator: Accelerator, window: Window) -> None:
        self.accelerator = accelerator
        self.monitor = Monitor(model, accelerator.device, partial(sum_over_processes, accelerator))
        self.start(window)

    def start(self, window: Window) -> None:
        """Go on from `window`; what in it is a sum over processes goes to one of them."""
        main = self.accelerator.is_main_process
        self._steps, self._seconds = window.steps, window.seconds
        self._sums = {
            name: torch.tensor(
                0.0 if name in _PER_PROCESS and not main else getattr(window, name),
                dtype=torch.float64,
                device=self.accelerator.device,
            )
            for name in _SUMMED
        }
        self._step = {name: torch.zeros_like(total) for name, total in self._sums.items()}
        self.monitor.start(window.statistics if main else {})

    def add(self, name: str, value: Tensor) -> None:
        """Add to one of the sums of the step in progress, without waiting for the device."""
        self._step[name] += value

    @property
    def step_loss(self) -> Tensor:
        """Of the step in progress: this process's part of all that is minimised over tokens."""
        return self._step["loss"] + self._step["auxiliary_loss"]

    def end_step(self, seconds: float, *, taken: bool) -> None:
        """Take the step in progress into the window, with the time it took, or leave it out."""
        if taken:
            self._steps += 1
            self._seconds += seconds
            for name, value in self._step.items():
                self._sums[name] += value
        for value in self._step.values():
            value.zero_()

    def read(self) -> Window:
        """The sums over all processes, which must all ask at once: this waits for the device."""
        own = torch.stack([self._sums[name] for name in _PER_PROCESS])
        shared = dict(zip(_PER_PROCESS, sum_over_processes(self.accelerator, own), strict=True))
        values: Mapping[str, Tensor] = {**self._sums, **shared}
        sums = {name: value.item() for name, value in values.items()}
        return Window(
            **{**sums, "tokens": int(sums["tokens"])},
            steps=self._steps,
            seconds=self._seconds,
            statistics=self.monitor.read(),
        )
